"""The kernel that makes a plan: one launch, one program for each record."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import interpreting
from .kernels.launch import PreparedLaunch, prepared_once
from .kernels.pages import PageSearch, find_page
from .kernels.signatures import MOST, offset_lanes


@triton.jit(do_not_specialize=["batch", "columns", "num_blocks", "total", "row_stride", "column_stride"])
def plan_kernel(
    table_ptr, cu_ptr, start_ptr,
    record_ptr,  # [capacity, 4] int32
    origin_ptr,  # [capacity, 3] int64
    given_ptr,  # [batch + 1] int64
    batch, columns, num_blocks, total, row_stride, column_stride,
    cu_strides,
    PAGES: tl.constexpr,  # a `PageSearch`
):  # fmt: skip
    """One record of a plan, of page n of sequence b with start s and offset o[b] (`kernels.pages.find_page`):

        record[o[b] // page_size + 2 b + n] = (table[b, s // page_size + n] or −1, first_row, rows, page_offset)

    Also its origin (sequence, column, id in the table), for `check()`, and a copy of one offset: a plan has more
    records than offsets.
    """
    record = tl.program_id(0)
    strides = (row_stride.to(tl.int64), column_stride.to(tl.int64), cu_strides[0], cu_strides[1])
    block_id, first_row, rows, page_offset, sequence, column, given_id = find_page(
        record, (table_ptr, cu_ptr, start_ptr), (batch, columns, num_blocks, total), strides, PAGES
    )
    used = rows > 0
    record = record.to(tl.int64)
    tl.store(record_ptr + record * 4, block_id.to(tl.int32))
    tl.store(record_ptr + record * 4 + 1, tl.where(used, first_row, 0).to(tl.int32))
    tl.store(record_ptr + record * 4 + 2, rows.to(tl.int32))
    tl.store(record_ptr + record * 4 + 3, tl.where(used, page_offset, 0).to(tl.int32))
    tl.store(origin_ptr + record * 3, sequence)
    tl.store(origin_ptr + record * 3 + 1, column)
    tl.store(origin_ptr + record * 3 + 2, given_id)
    if record <= batch:
        tl.store(given_ptr + record, tl.load(cu_ptr + record * cu_strides[0]).to(tl.int64))


def plan_records(
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    seq_starts: Tensor | None,
    page_size: int,
    num_blocks: int,
    total_tokens: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """A plan's records and their origins, in one launch.

    Args:
        block_table, cu_seqlens_k, seq_starts, page_size, num_blocks, total_tokens: as `GatherPlan.build` takes them,
            checked.
        capacity: records, at least as many as there are sequences and one more.

    Returns:
        As `plan.records_by_torch`, bit for bit.
    """
    device = block_table.device
    batch, columns = block_table.shape
    begin = batch + 1 + (batch + 1 & 1)  # of the origins, at a multiple of 16 bytes
    end = 2 * (begin + 3 * capacity + (capacity & 1))  # of the origins and their padding, in int32
    sources = torch.empty(end + 4 * capacity, dtype=torch.int32, device=device)
    records = torch.as_strided(sources, (capacity, 4), (4, 1), end)
    starts = cu_seqlens_k if seq_starts is None else seq_starts
    given_at = sources.data_ptr()
    addresses = (
        block_table.data_ptr(), cu_seqlens_k.data_ptr(), starts.data_ptr(), given_at + 4 * end, given_at + 8 * begin,
        given_at,
    )  # fmt: skip
    interpreted, lanes = interpreting(), offset_lanes(batch)
    cu_strides = (cu_seqlens_k.stride(0), starts.stride(0))
    wide = max(block_table.stride()) > MOST
    key = (  # without the tensors allocated here, which are always aligned
        page_size, seq_starts is None, lanes, interpreted, device, cu_strides, wide, block_table.dtype,
        cu_seqlens_k.dtype, starts.dtype, addresses[0] & 15, addresses[1] & 15, addresses[2] & 15,
    )  # fmt: skip

    def prepare() -> PreparedLaunch:
        constants = {"PAGES": PageSearch(page_size, seq_starts is not None, lanes), "num_warps": 1}
        return PreparedLaunch(plan_kernel, (None,) * 6, (cu_strides,), constants, interpreted)

    numbers = (batch, min(columns, MOST), num_blocks, total_tokens, *block_table.stride())
    launch = prepared_once(plan_kernel, key, prepare)
    if not launch.again(capacity, addresses, numbers):
        longs = sources.view(torch.int64)  # cut as in `plan.cut_sources`
        given, origin = longs[: batch + 1], longs[begin : begin + 3 * capacity].view(capacity, 3)
        launch(capacity, (block_table, cu_seqlens_k, starts, records, origin, given), addresses, numbers)
    return records, sources
