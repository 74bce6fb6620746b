"""The kernels that prepare a batch, over contents that are wrong in every way; each is compared with plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgather.batch.contents import Sizes
from kvgather.batch.reference import batch_tensors, window_offsets
from kvgather.batch.refused import refuse_rows
from kvgather.plan import cut_sources, records_by_torch

EXTREMES = (-1, 2**31 - 1, -(2**31), 40, 41)


def table_of(batch: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Block ids of a pool of 40 blocks, and every fifth one outside it."""
    table = torch.randint(40, (batch, columns), dtype=dtype)
    flat = table.view(-1)
    flat[::5] = torch.tensor(EXTREMES, dtype=dtype).repeat(-(-len(flat[::5]) // 5))[: len(flat[::5])]
    return table


def offsets_of(batch: int, longest: int, dtype: torch.dtype) -> Tensor:
    """Prefix sums of random lengths; every seventh falls, or passes any total."""
    offsets = torch.cat((torch.zeros(1), torch.randint(longest + 1, (batch,)).cumsum(0))).to(dtype)
    offsets[4::7] = torch.tensor([-5, 2**31 - 1], dtype=dtype).repeat(batch)[: len(offsets[4::7])]
    return offsets


def planned(batch: int, page_size: int, dtype: torch.dtype, starts: bool, device: str) -> None:
    """The records of a gather."""
    from kvgather.plan_kernel import plan_records

    table, offsets = table_of(batch, 5, dtype), offsets_of(batch, 4 * page_size, dtype)
    start = torch.randint(-2, 3 * page_size, (batch,), dtype=dtype) if starts else None
    total = 3 * page_size * batch
    sizes = (page_size, 40, total, -(-total // page_size) + 2 * batch)
    got = plan_records(table.to(device), offsets.to(device), None if start is None else start.to(device), *sizes)
    wanted = records_by_torch(table, offsets, start, *sizes)
    both = ((records, *cut_sources(sources, batch, len(records))) for records, sources in (got, wanted))
    pairs = zip(*both, strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.cpu(), theirs)


def batched(batch: int, page_size: int, dtype: torch.dtype, device: str) -> None:
    """The tensors of a prefix batch, and a window's offsets in it."""
    given = table_of(batch, 5, dtype), offsets_of(batch, 9, dtype), offsets_of(batch, 5 * page_size, dtype)
    sizes = Sizes(page_size, 40, total_q=7 * batch, total_k=4 * page_size * batch, max_q=8, most=5 * page_size)
    got = batch_tensors(*(tensor.to(device) for tensor in given), sizes, "triton")
    wanted = batch_tensors(*given, sizes, "torch")
    pairs = [(getattr(got, name), getattr(wanted, name)) for name in ("table", "cu_q", "cu_k", "slots")]
    bounds = (8, 3 * page_size, 2 * page_size * batch)
    pairs += zip(
        window_offsets(got.cu_q, got.cu_k, *bounds, "triton"),
        window_offsets(wanted.cu_q, wanted.cu_k, *bounds, "torch"),
        strict=True,
    )
    for ours, theirs in (*pairs, *zip(got.given(), wanted.given(), strict=True)):
        assert torch.equal(ours.cpu(), theirs)


def refused(dim: int, dtype: torch.dtype, device: str) -> None:
    """Rows of sequences that have too many, in strided outputs."""
    out, lse = torch.randn(30, 6, dim).to(dtype), torch.randn(3, 30).T
    ends = torch.tensor([0, 3, 14, 14, 28], dtype=torch.int32)
    got = out.clone().to(device), lse.T.contiguous().clone().to(device).T
    refuse_rows(got[0][:, ::2], got[1], ends.to(device), 5, "triton")
    refuse_rows(out[:, ::2], lse, ends, 5, "torch")
    for ours, theirs in zip(got, (out, lse), strict=True):
        assert torch.equal(ours.cpu().isnan(), theirs.isnan()) and torch.equal(
            ours.cpu().nan_to_num(), theirs.nan_to_num()
        )
