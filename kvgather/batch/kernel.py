"""The kernels that make a batch's tensors: one launch for the batch, and one for each window."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..kernels.launch import PreparedLaunch, prepared_once
from ..kernels.pages import clamped_offset
from ..kernels.signatures import MOST
from .contents import BatchTensors, Sizes

_STEP = 1024
"""Columns of the table, and new tokens, that a program takes in one step."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _offsets_of(sequence, pointers, strides, batch, total_q, total_k, max_len_k, CHUNK: tl.constexpr):
    """The checked offsets of one sequence, from all given offsets up to its own: begin_q, end_q, begin_k, len_k.

    Offsets count as their running maximum inside [0, total]; a sequence counts for `max_len_k` tokens of K at most.
    """
    cu_q_ptr, cu_k_ptr = pointers
    stride_q, stride_k = strides
    begin_q = sequence * 0
    end_q = sequence * 0
    begin_k = sequence * 0
    len_k = sequence * 0
    largest_begin = sequence * 0  # of K, in the chunks so far
    largest_end = tl.minimum(tl.maximum(tl.load(cu_k_ptr).to(tl.int64), 0), total_k).to(tl.int32)
    first = sequence * 0
    while first < sequence + 2:
        index = first + tl.arange(0, CHUNK)
        cu_q = clamped_offset(cu_q_ptr, index, stride_q, index <= tl.minimum(sequence + 1, batch), total_q)
        begin_q = tl.maximum(begin_q, tl.max(tl.where(index <= sequence, cu_q, 0), 0))
        end_q = tl.maximum(end_q, tl.max(cu_q, 0))
        counted = (index <= sequence) & (index < batch)
        begins = clamped_offset(cu_k_ptr, index, stride_k, counted, total_k)
        ends = clamped_offset(cu_k_ptr, index + 1, stride_k, counted, total_k)
        begins = tl.maximum(tl.associative_scan(begins, 0, _larger), largest_begin)
        ends = tl.maximum(tl.associative_scan(ends, 0, _larger), largest_end)
        largest_begin = tl.max(begins, 0)
        largest_end = tl.max(ends, 0)
        length = tl.where(counted, ends - tl.where(index == 0, 0, begins), 0)
        begin_k += tl.sum(tl.where(index < sequence, tl.minimum(length, max_len_k), 0), 0)
        len_k += tl.sum(tl.where(index == sequence, length, 0), 0)
        first += CHUNK
    return tl.where(sequence == 0, 0, begin_q), end_q, begin_k, len_k


@triton.jit
def _check_row(
    sequence, part, parts, len_k, table_ptr, checked_ptr, given_ptr, columns, num_blocks, stride_column,
    PAGE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Copy one row of the table as given, and as checked: −1 for ids outside the pool and columns past len_k tokens.

    A table without columns is checked as one column of −1.
    """
    checked_columns = tl.maximum(columns, 1)
    first = part * N
    while first < checked_columns:
        column = first + tl.arange(0, N)
        block_id = tl.load(table_ptr + column.to(tl.int64) * stride_column, mask=column < columns, other=-1)
        tl.store(given_ptr + sequence.to(tl.int64) * columns + column, block_id, mask=column < columns)
        good = (block_id >= 0) & (block_id < num_blocks) & (column.to(tl.int64) * PAGE < len_k)
        checked = tl.where(good, block_id, -1).to(tl.int32)
        tl.store(checked_ptr + sequence.to(tl.int64) * checked_columns + column, checked, mask=column < checked_columns)
        first += parts * N


@triton.jit
def _write_slots(
    part, parts, begin_q, end_q, end_read, len_k, table_ptr, slot_ptr, columns, num_blocks, stride_column,
    PAGE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The slot of each new token in [begin_q, end_q), −1 where it has none; none from `end_read` on has one."""
    row = begin_q.to(tl.int64) + part * N
    while row < end_q:
        new = row + tl.arange(0, N)
        position = len_k - end_q + new  # negative if there are more new tokens than tokens
        readable = (new < end_read) & (position >= 0)
        column = tl.minimum(tl.maximum(position, 0) // PAGE, columns - 1)
        block_id = tl.load(table_ptr + column * stride_column, mask=readable, other=-1).to(tl.int64)
        good = readable & (block_id >= 0) & (block_id < num_blocks)
        slot = tl.where(good, block_id * PAGE + tl.maximum(position, 0) % PAGE, -1)
        tl.store(slot_ptr + new, slot, mask=new < end_q)
        row += parts * N


@triton.jit(
    do_not_specialize=[
        "batch", "columns", "num_blocks", "total_q", "total_k", "max_q", "max_len_k", "parts",
        "stride_table_row", "stride_table_column", "stride_q", "stride_k",
    ]
)  # fmt: skip
def batch_kernel(
    table_ptr, cu_q_ptr, cu_k_ptr, checked_ptr, used_q_ptr, used_k_ptr, slot_ptr, given_ptr, given_q_ptr, given_k_ptr,
    batch, columns, num_blocks, total_q, total_k, max_q, max_len_k, parts,
    stride_table_row, stride_table_column, stride_q, stride_k,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The tensors of a checked batch, `batch.reference.batch_tensors`: for sequence b

        used_q[b]     = max over j ≤ b of cu_q[j], inside [0, total_q];  used_q[0] = 0
        used_k[b]     = Σ over j < b of min(len_k[j], max_len_k)
        checked[b, c] = table[b, c] if it is a block of the pool and c · PAGE < len_k[b], else −1
        slot[t]       = checked[b, p // PAGE] · PAGE + p % PAGE, where new token t has position p = len_k[b] − end_q + t

    A sequence with more than max_q new tokens or max_len_k tokens has no block and no slot. Also a copy of the table
    and of both offsets as given, for `check()`.

    `parts` programs share a sequence's row of the table and its new tokens; those of sequence `batch` have the rows
    that belong to no sequence. Each computes the offsets before its sequence itself: none waits for another.
    """
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    begin_q, end_q, begin_k, len_k = _offsets_of(
        sequence, (cu_q_ptr, cu_k_ptr), (stride_q, stride_k), batch, total_q, total_k, max_len_k, CHUNK
    )
    if part == 0:
        tl.store(used_q_ptr + sequence, begin_q)
        tl.store(used_k_ptr + sequence, begin_k)
        tl.store(given_q_ptr + sequence, tl.load(cu_q_ptr + sequence.to(tl.int64) * stride_q).to(tl.int64))
        tl.store(given_k_ptr + sequence, tl.load(cu_k_ptr + sequence.to(tl.int64) * stride_k).to(tl.int64))
    if sequence == batch:  # rows that belong to no sequence
        row = begin_q.to(tl.int64) + part * N
        while row < total_q:
            new = row + tl.arange(0, N)
            tl.store(slot_ptr + new, tl.full([N], -1, tl.int64), mask=new < total_q)
            row += parts * N
        return

    refused = (len_k > max_len_k) | (end_q - begin_q > max_q)
    table_ptr += sequence.to(tl.int64) * stride_table_row
    _check_row(
        sequence, part, parts, tl.where(refused, 0, len_k), table_ptr, checked_ptr, given_ptr, columns, num_blocks,
        stride_table_column, PAGE, N,
    )  # fmt: skip
    # A bound, because Triton 3.9's interpreter takes no mask that contains a comparison of two scalars.
    end_read = tl.where((refused == 0) & (columns > 0), end_q, 0)
    _write_slots(
        part, parts, begin_q, end_q, end_read, len_k, table_ptr, slot_ptr, columns, num_blocks, stride_table_column,
        PAGE, N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "max_q", "window", "capacity"])
def window_kernel(
    cu_q_ptr, cu_k_ptr, cu_seen_ptr, start_ptr, batch, max_q, window, capacity, CHUNK: tl.constexpr
):  # fmt: skip
    """The tokens that each sequence's window reaches, `batch.reference.window_offsets`, in one program:

        seen[b]  = min(len_k[b], min(len_q[b], max_q) + window − 1), 0 without new tokens
        start[b] = len_k[b] − seen[b]

    and the prefix sums of `seen`, at most `capacity`.
    """
    tl.store(cu_seen_ptr, 0)
    gathered = batch * 0
    first = batch * 0
    while first < batch:
        sequence = first + tl.arange(0, CHUNK)
        present = sequence < batch
        len_q = tl.load(cu_q_ptr + sequence + 1, mask=present, other=0)
        len_q -= tl.load(cu_q_ptr + sequence, mask=present, other=0)
        len_k = tl.load(cu_k_ptr + sequence + 1, mask=present, other=0)
        len_k -= tl.load(cu_k_ptr + sequence, mask=present, other=0)
        reach = tl.minimum(len_q, max_q).to(tl.int64) + window - 1
        seen = tl.where(len_q > 0, tl.minimum(reach, len_k), 0).to(tl.int32)
        tl.store(cu_seen_ptr + sequence + 1, tl.minimum(gathered + tl.cumsum(seen, 0), capacity), mask=present)
        tl.store(start_ptr + sequence, len_k - seen, mask=present)
        gathered += tl.sum(seen, 0)
        first += CHUNK


def launch_batch(table: Tensor, cu_q: Tensor, cu_k: Tensor, sizes: Sizes) -> BatchTensors:
    """Launch `batch_kernel` on checked arguments; see `kvgather.batch.reference.batch_tensors`."""
    batch, columns = table.shape
    interpreted, device = interpreting(), table.device
    row_stride, column_stride = table.stride()
    if row_stride > MOST or column_stride > MOST:  # the stride of an axis of at most one element
        table = torch.empty(table.shape, dtype=table.dtype, device=device).copy_(table)
        row_stride, column_stride = table.stride()
    q_stride, k_stride = min(cu_q.stride(0), MOST), min(cu_k.stride(0), MOST)
    checked_columns = max(columns, 1)
    # Copies of both offsets (int64) and of the table, for `check()`, which alone makes views of them.
    length = 2 * (batch + 1) + (2 * (batch + 1) & 3)
    copies = 2 * length + batch * columns * (table.element_size() // 4)
    sizes_in_memory = batch * checked_columns, batch + 1, batch + 1, 2 * sizes.total_q, copies
    (checked, used_q, used_k, slots, copied), narrow_at = _cut(sizes_in_memory, device)
    checked, slots = checked.view(batch, checked_columns), slots.view(torch.int64)
    given_at = narrow_at[4], narrow_at[4] + 4 * length
    table_dtype = table.dtype

    def given() -> tuple[Tensor, Tensor, Tensor]:
        offsets = copied[: 2 * length].view(torch.int64).view(2, length // 2)[:, : batch + 1]
        return copied[2 * length :].view(table_dtype).view(batch, columns), offsets[0], offsets[1]

    parts = min(max(1, -(-max(columns, sizes.max_q) // _STEP)), 16)
    at = table.data_ptr(), cu_q.data_ptr(), cu_k.data_ptr()
    key = (
        device, interpreted, sizes.page_size, table_dtype, cu_q.dtype, cu_k.dtype, at[0] & 15, at[1] & 15, at[2] & 15
    )  # fmt: skip
    launch = prepared_once("batch", key, lambda: _prepared_batch(sizes.page_size, interpreted))
    addresses = (*at, *narrow_at[:4], narrow_at[4] + 8 * length, *given_at)
    numbers = (
        batch, columns, sizes.num_blocks, sizes.total_q, sizes.total_k, sizes.max_q, sizes.most, parts,
        row_stride, column_stride, q_stride, k_stride,
    )  # fmt: skip
    programs = (batch + 1) * parts
    if not launch.again(programs, addresses, numbers):
        ids, given_q, given_k = given()
        tensors = (table, cu_q, cu_k, checked, used_q, used_k, slots, ids, given_q, given_k)
        launch(programs, tensors, addresses, numbers)
    return BatchTensors(checked, used_q, used_k, slots, given)


def _prepared_batch(page_size: int, interpreted: bool) -> PreparedLaunch:
    constants = {"PAGE": page_size, "CHUNK": 16 if interpreted else 256, "N": _STEP}
    return PreparedLaunch(batch_kernel, (None,) * 10, (), constants, interpreted)


def launch_window(cu_q: Tensor, cu_k: Tensor, max_q: int, window: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Launch `window_kernel`; see `kvgather.batch.reference.window_offsets`."""
    batch, interpreted = cu_q.shape[0] - 1, interpreting()
    (cu_seen, starts), out_at = _cut((batch + 1, batch), cu_q.device)
    at = cu_q.data_ptr(), cu_k.data_ptr()
    key = cu_q.device, interpreted, at[0] & 15, at[1] & 15
    launch = prepared_once("window", key, lambda: _prepared_window(interpreted))
    launch(1, (cu_q, cu_k, cu_seen, starts), (*at, *out_at), (batch, max_q, window, capacity))
    return cu_seen, starts


def _prepared_window(interpreted: bool) -> PreparedLaunch:
    return PreparedLaunch(window_kernel, (None,) * 4, (), {"CHUNK": 16 if interpreted else 1024}, interpreted)


def _cut(sizes: Iterable[int], device: torch.device) -> tuple[tuple[Tensor, ...], list[int]]:
    """int32 tensors of these sizes in one allocation, each at a multiple of 16 bytes, and their addresses.

    One allocation takes less time than several, and kernels are compiled for addresses of this alignment.
    """
    cuts: list[int] = []
    begins: list[int] = []
    end = 0
    for size in sizes:
        padding = -size & 3
        cuts += (size, padding)
        begins.append(4 * end)
        end += size + padding
    memory = torch.empty(end, dtype=torch.int32, device=device)
    first = memory.data_ptr()
    return memory.split_with_sizes(cuts)[::2], [first + begin for begin in begins]
