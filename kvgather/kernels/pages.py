"""Which page a program serves: from the batch's offsets and its block table, with no plan made before.

A sequence's pages have records at fixed places: the first of sequence b is number `offset[b] // PAGE + 2 * b`, whatever
came before it, which always leaves room for all of its pages. So a program finds its sequence in the offsets alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamped_offset(cu_ptr, index, stride_cu, present, total):
    """`cu_seqlens[index]` inside 0 to `total`, int64; 0 where not present."""
    offset = tl.load(cu_ptr + index.to(tl.int64) * stride_cu, mask=present, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(offset, 0), total)


@triton.jit
def find_sequence(record, cu_ptr, batch, total, stride_cu, PAGE: tl.constexpr, LANES: tl.constexpr):
    """The last sequence whose first record is `record` or an earlier one, and the offset it begins at, int64.

    Offsets count as their running maximum m: the first record of sequence b is m[b] // PAGE + 2b. An offset at j delays
    every sequence from j on, so each says from which b on the first record is too late, and the least of them decides;
    no scan is needed. (−1, 0) before the first sequence.
    """
    lane = tl.arange(0, LANES)
    end = batch.to(tl.int64)
    for first in range(0, batch, LANES):
        index = (first + lane).to(tl.int64)
        present = index < batch
        room = record - clamped_offset(cu_ptr, index, stride_cu, present, total) // PAGE
        too_late = tl.where(room < 0, index, tl.maximum(index, room // 2 + 1))
        end = tl.minimum(end, tl.min(tl.where(present, too_late, end), 0))
    begin = end * 0
    for first in range(0, batch, LANES):
        index = (first + lane).to(tl.int64)
        before = index < end
        begin = tl.maximum(begin, tl.max(clamped_offset(cu_ptr, index, stride_cu, before, total), 0))
    return end - 1, begin


@triton.jit
def find_page(
    record, table_ptr, cu_ptr, start_ptr, batch, columns, num_blocks, total, strides, PAGE: tl.constexpr,
    STARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The page of one record: block or −1, first row, rows, page offset of the first row, sequence, column, id.

    Args:
        record: int64, from 0.
        table_ptr: `[batch, columns]` int32 or int64.
        cu_ptr: `[batch + 1]` int32 or int64.
        start_ptr: `[batch]`, positions at which sequences begin; read if STARTS.
        strides: of the table's rows and columns, of cu and of start.
        LANES: offsets looked at together.

    Returns:
        `rows` 0 for a record that no sequence uses. `block` is −1 where the table has no block of the pool to read;
        `id` is what it has there, −1 outside of it. All int64.
    """
    sequence, begin = find_sequence(record, cu_ptr, batch, total, strides[2], PAGE, LANES)
    used = sequence >= 0
    safe = tl.maximum(sequence, 0)
    length = tl.maximum(clamped_offset(cu_ptr, safe + 1, strides[2], used, total) - begin, 0)
    start = safe * 0
    if STARTS:
        start = tl.load(start_ptr + safe * strides[3], mask=used, other=0).to(tl.int64)
    nth = record - begin // PAGE - 2 * safe  # which page of its sequence
    first_offset = tl.maximum(start, 0) % PAGE
    page_offset = tl.where(nth == 0, first_offset, 0)
    done = tl.where(nth == 0, 0, nth * PAGE - first_offset)  # rows of earlier pages
    rows = tl.where(used, tl.maximum(tl.minimum(PAGE - page_offset, length - done), 0), 0)
    column = tl.where(start < 0, -1, tl.maximum(start, 0) // PAGE + nth)
    # A start near 2^63 can wrap around to a negative column.
    present = (rows > 0) & (column >= 0) & (column < columns)
    at = safe * strides[0] + tl.where(present, column, 0) * strides[1]
    block_id = tl.load(table_ptr + at, mask=present, other=-1).to(tl.int64)
    block = tl.where((block_id >= 0) & (block_id < num_blocks), block_id, -1)
    return block, begin + done, rows, page_offset, safe, column, block_id
