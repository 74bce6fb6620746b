"""The kernels that make a batch's tensors: one launch for the batch, and one for each window."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..kernels.launch import PreparedLaunch, prepared_once
from ..kernels.signatures import MOST
from .contents import BatchTensors, Sizes

_AT_A_TIME = 1024  # columns of the table, and new tokens, of one step of a program


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _offsets(cu_ptr, index, there, stride, total):
    """Offsets clamped to [0, total], int32; 0 where there are none."""
    offset = tl.load(cu_ptr + index.to(tl.int64) * stride, mask=there, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(offset, 0), total).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "batch", "columns", "num_blocks", "total_q", "total_k", "max_q", "most", "parts",
        "stride_table_row", "stride_table_column", "stride_q", "stride_k",
    ]
)  # fmt: skip
def batch_kernel(
    table_ptr, cu_q_ptr, cu_k_ptr, checked_ptr, used_q_ptr, used_k_ptr, slot_ptr, given_ptr, given_q_ptr, given_k_ptr,
    batch, columns, num_blocks, total_q, total_k, max_q, most, parts,
    stride_table_row, stride_table_column, stride_q, stride_k,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Programs of sequence b: `parts`, which share its row of the table and its new tokens; those of sequence `batch`
    have the rows that belong to none. Each works out the offsets before it by itself: nothing waits for another."""
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    begin_q = sequence * 0  # new tokens before this sequence, and its own included
    end_q = sequence * 0
    begin_k = sequence * 0  # tokens before it, of each sequence as many as it may have
    len_k = sequence * 0
    before = sequence * 0  # the largest offset so far, of sequences' begins, and of their ends
    after = tl.minimum(tl.maximum(tl.load(cu_k_ptr).to(tl.int64), 0), total_k).to(tl.int32)
    first = sequence * 0
    while first < sequence + 2:
        index = first + tl.arange(0, CHUNK)
        new = _offsets(cu_q_ptr, index, index <= tl.minimum(sequence + 1, batch), stride_q, total_q)
        begin_q = tl.maximum(begin_q, tl.max(tl.where(index <= sequence, new, 0), 0))
        end_q = tl.maximum(end_q, tl.max(new, 0))
        own = (index <= sequence) & (index < batch)
        begins = _offsets(cu_k_ptr, index, own, stride_k, total_k)
        ends = _offsets(cu_k_ptr, index + 1, own, stride_k, total_k)
        begins = tl.maximum(tl.associative_scan(begins, 0, _larger), before)
        ends = tl.maximum(tl.associative_scan(ends, 0, _larger), after)
        before = tl.max(begins, 0)
        after = tl.max(ends, 0)
        length = tl.where(own, ends - tl.where(index == 0, 0, begins), 0)
        begin_k += tl.sum(tl.where(index < sequence, tl.minimum(length, most), 0), 0)
        len_k += tl.sum(tl.where(index == sequence, length, 0), 0)
        first += CHUNK
    begin_q = tl.where(sequence == 0, 0, begin_q)
    if part == 0:
        tl.store(used_q_ptr + sequence, begin_q)
        tl.store(used_k_ptr + sequence, begin_k)
        tl.store(given_q_ptr + sequence, tl.load(cu_q_ptr + sequence.to(tl.int64) * stride_q).to(tl.int64))
        tl.store(given_k_ptr + sequence, tl.load(cu_k_ptr + sequence.to(tl.int64) * stride_k).to(tl.int64))
    lane = tl.arange(0, N)
    row = begin_q.to(tl.int64) + part * N
    if sequence == batch:  # rows that belong to no sequence
        while row < total_q:
            tl.store(slot_ptr + row + lane, tl.full([N], -1, tl.int64), mask=row + lane < total_q)
            row += parts * N
        return

    refused = (len_k > most) | (end_q - begin_q > max_q)
    len_k = tl.minimum(len_k, most)
    table_ptr += sequence.to(tl.int64) * stride_table_row
    wide = tl.maximum(columns, 1)  # with no table there is one column, of no block
    first = part * N
    while first < wide:
        column = first + lane
        block = tl.load(table_ptr + column.to(tl.int64) * stride_table_column, mask=column < columns, other=-1)
        tl.store(given_ptr + sequence.to(tl.int64) * columns + column, block, mask=column < columns)
        good = (block >= 0) & (block < num_blocks) & (column.to(tl.int64) * PAGE < len_k) & (refused == 0)
        checked = tl.where(good, block, -1).to(tl.int32)
        tl.store(checked_ptr + sequence.to(tl.int64) * wide + column, checked, mask=column < wide)
        first += parts * N

    # A bound, because Triton 3.9's interpreter takes no mask that contains a comparison of two scalars.
    end_read = tl.where((refused == 0) & (columns > 0), end_q, 0)
    while row < end_q:
        mine = row + lane < end_q
        position = len_k - end_q + row + lane  # below 0 there are more new tokens than tokens
        there = (row + lane < end_read) & (position >= 0)
        column = tl.minimum(tl.maximum(position, 0) // PAGE, columns - 1)
        block = tl.load(table_ptr + column * stride_table_column, mask=there, other=-1).to(tl.int64)
        there = there & (block >= 0) & (block < num_blocks)
        tl.store(slot_ptr + row + lane, tl.where(there, block * PAGE + tl.maximum(position, 0) % PAGE, -1), mask=mine)
        row += parts * N


@triton.jit(do_not_specialize=["batch", "max_q", "window", "capacity"])
def window_kernel(
    cu_q_ptr, cu_k_ptr, cu_seen_ptr, start_ptr, batch, max_q, window, capacity, CHUNK: tl.constexpr
):  # fmt: skip
    """One program: the tokens that each sequence's window reaches, their offsets and where they begin."""
    tl.store(cu_seen_ptr, 0)
    gathered = batch * 0
    first = batch * 0
    while first < batch:
        sequence = first + tl.arange(0, CHUNK)
        there = sequence < batch
        len_q = tl.load(cu_q_ptr + sequence + 1, mask=there, other=0)
        len_q -= tl.load(cu_q_ptr + sequence, mask=there, other=0)
        len_k = tl.load(cu_k_ptr + sequence + 1, mask=there, other=0)
        len_k -= tl.load(cu_k_ptr + sequence, mask=there, other=0)
        reach = tl.minimum(len_q, max_q).to(tl.int64) + window - 1
        seen = tl.where(len_q > 0, tl.minimum(reach, len_k), 0).to(tl.int32)
        tl.store(cu_seen_ptr + sequence + 1, tl.minimum(gathered + tl.cumsum(seen, 0), capacity), mask=there)
        tl.store(start_ptr + sequence, len_k - seen, mask=there)
        gathered += tl.sum(seen, 0)
        first += CHUNK


def launch_batch(table: Tensor, cu_q: Tensor, cu_k: Tensor, sizes: Sizes) -> BatchTensors:
    """Launch `batch_kernel` on checked arguments; see `kvgather.batch.reference.batch_tensors`."""
    batch, columns = table.shape
    interpreted, device = interpreting(), table.device
    row_stride, column_stride = table.stride()
    if row_stride > MOST or column_stride > MOST:  # of an axis of one element, at most
        table = torch.empty(table.shape, dtype=table.dtype, device=device).copy_(table)
        row_stride, column_stride = table.stride()
    q_stride, k_stride = min(cu_q.stride(0), MOST), min(cu_k.stride(0), MOST)
    wide = max(columns, 1)
    narrow, narrow_at = _cut((batch * wide, batch + 1, batch + 1), torch.int32, device)
    checked = narrow[0].view(batch, wide)
    # Slots, then the copies of both offsets and of the table, each at a multiple of 16 bytes: those are for `check()`
    # alone, which cuts them.
    length = batch + 1 + (batch + 1 & 1)
    q_begin = sizes.total_q + (sizes.total_q & 1)
    k_begin, copy_begin = q_begin + length, q_begin + 2 * length
    end = copy_begin + -(-batch * columns * table.element_size() // 8)
    memory = torch.empty(end, dtype=torch.int64, device=device)

    def given() -> tuple[Tensor, Tensor, Tensor]:
        ids = memory[copy_begin:].view(table.dtype)[: batch * columns].view(batch, columns)
        return ids, memory[q_begin : q_begin + batch + 1], memory[k_begin : k_begin + batch + 1]

    slots = memory[: sizes.total_q]
    parts = min(max(1, -(-max(columns, sizes.max_q) // _AT_A_TIME)), 16)
    at, first = (table.data_ptr(), cu_q.data_ptr(), cu_k.data_ptr()), memory.data_ptr()
    key = (
        device, interpreted, sizes.page_size, table.dtype, cu_q.dtype, cu_k.dtype, at[0] & 15, at[1] & 15, at[2] & 15
    )  # fmt: skip
    launch = prepared_once("batch", key, lambda: _prepared_batch(sizes.page_size, interpreted))
    addresses = (*at, *narrow_at, first, first + 8 * copy_begin, first + 8 * q_begin, first + 8 * k_begin)
    numbers = (
        batch, columns, sizes.num_blocks, sizes.total_q, sizes.total_k, sizes.max_q, sizes.most, parts,
        row_stride, column_stride, q_stride, k_stride,
    )  # fmt: skip
    programs = (batch + 1) * parts
    if not launch.again(programs, addresses, numbers):
        ids, copy_q, copy_k = given()
        tensors = (table, cu_q, cu_k, checked, narrow[1], narrow[2], slots, ids, copy_q, copy_k)
        launch(programs, tensors, addresses, numbers)
    return BatchTensors(checked, narrow[1], narrow[2], slots, given)


def _prepared_batch(page_size: int, interpreted: bool) -> PreparedLaunch:
    constants = {"PAGE": page_size, "CHUNK": 16 if interpreted else 256, "N": _AT_A_TIME}
    return PreparedLaunch(batch_kernel, (None,) * 10, (), constants, interpreted)


def launch_window(cu_q: Tensor, cu_k: Tensor, max_q: int, window: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Launch `window_kernel`; see `kvgather.batch.reference.window_offsets`."""
    batch, interpreted = cu_q.shape[0] - 1, interpreting()
    (cu_seen, starts), made_at = _cut((batch + 1, batch), torch.int32, cu_q.device)
    at = cu_q.data_ptr(), cu_k.data_ptr()
    key = cu_q.device, interpreted, at[0] & 15, at[1] & 15
    launch = prepared_once("window", key, lambda: _prepared_window(interpreted))
    launch(1, (cu_q, cu_k, cu_seen, starts), (*at, *made_at), (batch, max_q, window, capacity))
    return cu_seen, starts


def _prepared_window(interpreted: bool) -> PreparedLaunch:
    return PreparedLaunch(window_kernel, (None,) * 4, (), {"CHUNK": 16 if interpreted else 1024}, interpreted)


def _cut(sizes: Iterable[int], dtype: torch.dtype, device: torch.device) -> tuple[tuple[Tensor, ...], list[int]]:
    """Tensors of these sizes in one allocation, each at a multiple of 16 bytes, and their addresses.

    To allocate them one by one takes longer, and kernels are compiled for such addresses.
    """
    itemsize = dtype.itemsize
    cuts: list[int] = []
    begins: list[int] = []
    end = 0
    for size in sizes:
        padding = -size & (16 // itemsize - 1)
        cuts += (size, padding)
        begins.append(end * itemsize)
        end += size + padding
    memory = torch.empty(end, dtype=dtype, device=device)
    first = memory.data_ptr()
    return memory.split_with_sizes(cuts)[::2], [first + begin for begin in begins]
