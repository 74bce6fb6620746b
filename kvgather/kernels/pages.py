"""Which page a program serves: from a plan's record, or from the batch's offsets and its block table without a plan.

The pages of a sequence have records at fixed places: the first of sequence b is number `offset[b] // PAGE + 2 * b`,
whatever the earlier sequences are; this always leaves room for all of its pages. So a program finds its sequence in the
offsets alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .signatures import offset_lanes

ONE_WARP = tl.constexpr(32)
"""Lanes that hold all offsets of a batch at once, one beyond the last sequence included; see `offset_lanes`."""


@dataclass(frozen=True)
class PageSearch:
    """What a kernel is compiled for where it finds pages in a block table: one `tl.constexpr`.

    Attributes:
        page_size: slots of a page.
        starts: whether sequences have positions at which they begin; else they begin at 0.
        lanes: offsets that a program reads at a time.
    """

    page_size: int
    starts: bool
    lanes: int

    @classmethod
    def of(cls, page_size: int, cu_seqlens: Tensor, starts: Tensor | None) -> PageSearch:
        """The search in a batch with these offsets, `[batch + 1]`, and starts."""
        return cls(page_size, starts is not None, offset_lanes(cu_seqlens.shape[0] - 1))


@triton.jit
def load_record(record_ptr, record):
    """One record of a plan: block id or −1 (int64), first row, rows, page offset of the first row (int32)."""
    record_ptr += record.to(tl.int64) * 4
    block_id = tl.load(record_ptr).to(tl.int64)
    return block_id, tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)


@triton.jit
def clamped_offset(cu_ptr, index, stride_cu, present, total):
    """`cu_seqlens[index]` inside 0 to `total`, int32; 0 where not present."""
    offset = tl.load(cu_ptr + index.to(tl.int64) * stride_cu, mask=present, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(offset, 0), total).to(tl.int32)


@triton.jit
def first_too_late(index, offset, record, PAGE: tl.constexpr):
    """The first sequence that cannot own `record`, as far as the offset at `index` decides; int32.

    The first record of sequence b is m[b] // PAGE + 2b, where m is the running maximum of the offsets. So an offset at
    j delays every sequence from j on: those b with 2b > record - offset // PAGE begin after the record. The least of
    what all offsets say decides; no scan is needed.
    """
    room = record - offset // PAGE
    return tl.where(room < 0, index, tl.maximum(index, room // 2 + 1))


@triton.jit
def find_sequence(record, cu_ptr, batch, total, stride_cu, PAGE: tl.constexpr, LANES: tl.constexpr):
    """The last sequence whose first record is `record` or an earlier one, and where it begins and ends, int32.

    −1 before the first sequence. Offsets count as their running maximum; see `first_too_late`. Reductions are of
    32 bits: a GPU has one instruction for a warp's minimum or maximum of them.
    """
    lane = tl.arange(0, LANES)
    if LANES == ONE_WARP:  # every offset is loaded once
        offset = clamped_offset(cu_ptr, lane, stride_cu, lane <= batch, total)
        end = tl.min(tl.where(lane < batch, first_too_late(lane, offset, record, PAGE), batch), 0)
        begin_offset = tl.max(tl.where(lane < end, offset, 0), 0)
        end_offset = tl.max(tl.where(lane == end, offset, 0), 0)
    else:
        end = batch
        for first in range(0, batch, LANES):
            index = first + lane
            offset = clamped_offset(cu_ptr, index, stride_cu, index < batch, total)
            too_late = first_too_late(index, offset, record, PAGE)
            end = tl.minimum(end, tl.min(tl.where(index < batch, too_late, end), 0))
        begin_offset = end * 0
        for first in range(0, batch, LANES):
            index = first + lane
            offset = clamped_offset(cu_ptr, index, stride_cu, index < end, total)
            begin_offset = tl.maximum(begin_offset, tl.max(offset, 0))
        end_offset = clamped_offset(cu_ptr, end, stride_cu, end >= 0, total)
    return end - 1, begin_offset, end_offset


@triton.jit
def pick(values, chosen):
    """The int32 or int64 value at which `chosen` is set, int64; reductions are of 32 bits, as in `find_sequence`."""
    least: tl.constexpr = -(2**31)
    low = tl.max(tl.where(chosen, values.to(tl.int32), least), 0).to(tl.int64)
    if values.dtype == tl.int64:
        high = tl.max(tl.where(chosen, (values >> 32).to(tl.int32), least), 0).to(tl.int64)
        low = (high << 32) | (low & 0xFFFFFFFF)
    return low


@triton.jit
def find_page(record, pointers, sizes, strides, PAGES: tl.constexpr):
    """The page of one record: block id or −1, first row, rows, page offset of the first row, sequence, column, id.

    Page n of sequence b, whose tokens begin at position s = start[b], is column s // page_size + n of its row of the
    table. Page 0 begins at page_offset s % page_size, the others at 0; rows end with the page or with the sequence.

    Args:
        record: int32, from 0.
        pointers: of the block table `[batch, columns]`, the offsets `[batch + 1]`, and the positions `[batch]` at
            which sequences begin, read if `PAGES.starts`; int32 or int64 each.
        sizes: batch, columns, blocks of the pool, tokens at most.
        strides: of the table's rows and columns, of offsets and of starts.
        PAGES: a `PageSearch`.

    Returns:
        `rows` is 0 for a record that no sequence uses. The block id is −1 where the table names no block of the pool;
        `id` is the table's entry, −1 outside of it. All int64.
    """
    table_ptr, cu_ptr, start_ptr = pointers
    batch, columns, num_blocks, total = sizes
    PAGE: tl.constexpr = PAGES.page_size
    if PAGES.starts and PAGES.lanes == ONE_WARP:  # all starts are loaded with the offsets: one wait for memory, not two
        lane = tl.arange(0, PAGES.lanes)
        starts = tl.load(start_ptr + lane.to(tl.int64) * strides[3], mask=lane < batch, other=0)
    sequence, begin, end = find_sequence(record, cu_ptr, batch, total, strides[2], PAGE, PAGES.lanes)
    used = sequence >= 0
    safe = tl.maximum(sequence, 0).to(tl.int64)
    length = tl.maximum(end - begin, 0)
    start = safe * 0
    if PAGES.starts:
        if PAGES.lanes == ONE_WARP:
            start = tl.where(used, pick(starts, lane == sequence), 0)
        else:
            start = tl.load(start_ptr + safe * strides[3], mask=used, other=0).to(tl.int64)
    nth = record - begin // PAGE - 2 * safe  # which page of its sequence
    first_offset = tl.maximum(start, 0) % PAGE
    page_offset = tl.where(nth == 0, first_offset, 0)
    done = tl.where(nth == 0, 0, nth * PAGE - first_offset)  # rows of earlier pages
    rows = tl.where(used, tl.maximum(tl.minimum(PAGE - page_offset, length - done), 0), 0)
    column = tl.where(start < 0, -1, tl.maximum(start, 0) // PAGE + nth)
    # A start near 2^63 can wrap around to a negative column.
    present = (rows > 0) & (column >= 0) & (column < columns)
    entry = safe * strides[0] + tl.where(present, column, 0) * strides[1]
    given_id = tl.load(table_ptr + entry, mask=present, other=-1).to(tl.int64)
    block_id = tl.where((given_id >= 0) & (given_id < num_blocks), given_id, -1)
    return block_id, begin + done, rows, page_offset, safe, column, given_id
