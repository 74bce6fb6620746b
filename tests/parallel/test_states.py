"""The buffers of an exchange, and the merge of the states in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgather.batch.share import Share
from kvgather.parallel.exchange import Exchange, wire_of
from kvgather.parallel.form import ALIGNED, StateForm
from kvgather.parallel.states import least_bytes, merged, merged_in_torch
from tests.memory import memory
from tests.where import on_each_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 4, 16), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_writes_into_its_own_buffer(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    form = StateForm(*shape, dtype)
    for rank in range(3):
        exchange = Exchange(Share(rank, 3), CPU)
        out, lse = exchange.own(shape, dtype)
        first, wire = exchange.buffers.data_ptr(), exchange.wire
        assert exchange.form == form and tuple(exchange.buffers.shape) == (3, form.nbytes)
        assert (out.data_ptr(), lse.data_ptr()) == (first + wire.out_at, first + wire.lse_at)
        assert (wire.out_at, wire.lse_at) == (rank * form.nbytes, rank * form.nbytes + form.lse_at)
        assert wire.received == 2 * form.nbytes and wire.least == least_bytes(form, 3)
        at = exchange.allocate(shape, dtype)
        assert at == (exchange.buffers.data_ptr() + wire.out_at, exchange.buffers.data_ptr() + wire.lse_at)
        assert all(address % 16 == 0 for address in (wire.out_at, wire.lse_at))


def test_an_exchange_without_rows_has_no_bytes() -> None:
    exchange = Exchange(Share(1, 2), CPU)
    out, lse = exchange.own((0, 4, 16), torch.bfloat16)
    assert (out.shape, lse.shape) == ((0, 4, 16), (0, 4)) and exchange.wire.received == 0
    assert wire_of((2, 4, 16), torch.bfloat16, Share(1, 2)).received > 0


@on_each_device
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_output_does_not_depend_on_whether_its_log_sum_exp_is_wanted(
    has_sinks: bool, backend: str, where: str
) -> None:
    form = StateForm(5, 4, 24, torch.bfloat16)
    buffers = torch.empty((3, form.nbytes), dtype=torch.uint8, device=where)
    outs, lses = form.views(buffers, 3)
    outs.copy_(torch.randn(outs.shape))
    lses.copy_(torch.randn(lses.shape))
    lses[1, 2] = -torch.inf
    sinks = torch.randn(4, device=where, requires_grad=True) if has_sinks else None
    out, lse = merged(buffers, form, 3, sinks, backend)
    alone, nothing = merged(buffers, form, 3, sinks, backend, want_lse=False)
    assert torch.equal(out, alone) and nothing is None and lse is not None
    assert not (out.requires_grad or lse.requires_grad)
    expected, expected_lse = merged(buffers, form, 3, sinks, "torch")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_states_of_more_than_2_to_the_31_elements(dtype: torch.dtype, where: str) -> None:
    """The last rank's state begins past them. On a GPU all rows are merged; in the interpreter a few."""
    ranks, heads, dim = 8, 64, 128
    form = StateForm(2**31 // (7 * heads * dim) + 1, heads, dim, dtype)
    assert (ranks - 1) * form.nbytes // dtype.itemsize > 2**31
    buffers = memory(ranks * form.nbytes, torch.uint8, where).view(ranks, form.nbytes)
    outs, lses = form.views(buffers, ranks)
    if where == "cuda":
        buffers.zero_()
        rows = torch.tensor([0, 1, form.rows // 2, form.rows - 1], device=where)
    else:
        rows = torch.arange(2)
    outs[:, rows] = torch.randn(ranks, len(rows), heads, dim, device=where).to(dtype)
    lses[:, rows] = torch.randn(ranks, len(rows), heads, device=where)
    few = StateForm(len(rows), heads, dim, dtype)
    copies = torch.empty((ranks, few.nbytes), dtype=torch.uint8, device=where)
    for copy, all_rows in zip(few.views(copies, ranks), (outs, lses), strict=True):
        copy.copy_(all_rows[:, rows])
    expected, expected_lse = merged_in_torch(copies, few, ranks, None)
    if where == "cuda":
        out, lse = merged(buffers, form, ranks, None)
        assert lse is not None
        out, lse = out[rows], lse[rows]
    else:
        out, lse = merge_first_rows(buffers, form, len(rows), ranks)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def merge_first_rows(buffers: Tensor, form: StateForm, rows: int, ranks: int) -> tuple[Tensor, Tensor]:
    """As `merge_ranks`, with as many programs as the first rows need."""
    from kvgather.parallel.states_kernel import merge_ranks_kernel

    heads, dim, together = form.heads, form.v_dim, 8
    out, lse = torch.empty((rows, heads, dim), dtype=form.dtype), torch.empty((rows, heads))
    outs, lses = form.views(buffers, ranks)
    merge_ranks_kernel[(rows * heads // together,)](
        outs, lses, outs, out, lse, form.rows * heads, form.nbytes // ALIGNED, HEADS=heads, DIM=dim, DIMS=dim,
        RANKS=ranks, R=together, SINKS=False, LSE=True, BY_HAND=True, UNIT=ALIGNED,
    )  # fmt: skip
    return out, lse
