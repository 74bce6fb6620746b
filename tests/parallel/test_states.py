"""The buffers of an exchange, and the merge of the states in them."""

from __future__ import annotations

import pytest
import torch

from kvgather.batch.share import Share
from kvgather.parallel.exchange import Exchange, wire_of
from kvgather.parallel.form import StateForm
from kvgather.parallel.states import least_bytes, merged
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
