"""The merge of all ranks' states: a buffer for each rank, the kernel and its twin in torch, against the formula."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from kvgather.parallel.form import ALIGNED, StateForm
from kvgather.parallel.states import least_bytes, merged
from tests.where import on_each_device

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def buffers_of(states: list[tuple[Tensor, Tensor]], device: str) -> tuple[Tensor, StateForm]:
    """The ranks' states as the all-gather leaves them, and behind them a buffer that is not to be read."""
    out, _ = states[0]
    form = StateForm(out.shape[0], out.shape[1], out.shape[2], out.dtype)
    buffers = torch.full((len(states) + 1, form.nbytes), 0xFF, dtype=torch.uint8)
    for rank, state in enumerate(states):
        for to, part in zip(form.view(buffers, rank), state, strict=True):
            to.copy_(part)
    return buffers.to(device), form


def formula(states: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """In FP64: each state weighs `exp(lse)`, and the sink counts in the denominator alone."""
    outs = torch.stack([out.double() for out, _ in states])
    lses = torch.stack([lse.double() for _, lse in states])
    everything = lses if sinks is None else torch.cat([lses, sinks.double().expand(1, *lses.shape[1:])])
    lse = everything.logsumexp(0)
    weights = torch.where(lses == -math.inf, 0.0, (lses - lse).exp())[..., None]
    return torch.where(weights == 0, 0.0, weights * outs).sum(0), lse


def drawn(seed: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None, torch.dtype]:
    """States of some ranks; those without keys have −inf, and NaN for an output."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks, rows, heads = draw.randint(2, 5), draw.choice([1, 3, 40]), draw.choice([1, 6])
    dim, dtype = draw.choice([1, 8, 24, 64, 80]), DTYPES[seed % 3]
    states = []
    for _ in range(ranks):
        out = torch.randn(rows, heads, dim, generator=numbers).to(dtype)
        lse = torch.randn(rows, heads, generator=numbers) * draw.choice([1.0, 50.0])
        nothing = torch.rand(rows, heads, generator=numbers) < draw.choice([0.0, 0.4, 1.0])
        out[nothing], lse[nothing] = math.nan, -math.inf
        states.append((out, lse))
    sinks = torch.randn(heads, generator=numbers).to(draw.choice(DTYPES)) if draw.random() < 0.5 else None
    return states, sinks, dtype


@pytest.mark.parametrize("backend", BACKENDS)
@on_each_device
@pytest.mark.parametrize("seed", range(24))
def test_the_formula(seed: int, where: str, backend: str) -> None:
    states, sinks, dtype = drawn(seed)
    buffers, form = buffers_of(states, where)
    before = buffers.clone()
    given = None if sinks is None else sinks.to(where)
    out, lse = (part.cpu() for part in merged(buffers, form, len(states), given, backend))
    wanted, wanted_lse = formula(states, sinks)
    assert out.dtype == dtype and lse.dtype == torch.float32 and torch.equal(buffers, before)
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@on_each_device
def test_by_hand(where: str, backend: str) -> None:
    """Denominators 2 and 6, and a sink that counts as 8: weights 1/8, 3/8 and a half that brings nothing."""
    states = [(torch.full((1, 1, 2), out), torch.full((1, 1), math.log(total))) for out, total in ((4.0, 2), (8.0, 6))]
    buffers, form = buffers_of(states, where)
    out, lse = merged(buffers, form, 2, torch.tensor([math.log(8)], device=where), backend)
    assert out.flatten().tolist() == pytest.approx([3.5, 3.5]) and float(lse) == pytest.approx(math.log(16))


@pytest.mark.parametrize("backend", BACKENDS)
@on_each_device
def test_nan_of_a_rank_stays_and_only_in_its_row(where: str, backend: str) -> None:
    states = [(torch.ones(3, 2, 8), torch.zeros(3, 2)) for _ in range(3)]
    states[1][0][1, 0], states[1][1][1, 0] = math.nan, math.nan
    buffers, form = buffers_of(states, where)
    out, lse = (part.cpu() for part in merged(buffers, form, 3, torch.zeros(2, device=where), backend))
    nan = torch.zeros(3, 2, dtype=torch.bool)
    nan[1, 0] = True
    assert torch.equal(lse.isnan(), nan) and torch.equal(out.isnan(), nan[..., None].expand_as(out))


@pytest.mark.parametrize("backend", BACKENDS)
@on_each_device
@pytest.mark.parametrize("sink", [None, 0.7])
def test_rows_that_no_rank_sees(sink: float | None, where: str, backend: str) -> None:
    states = [(torch.full((2, 1, 4), math.nan), torch.full((2, 1), -math.inf)) for _ in range(2)]
    buffers, form = buffers_of(states, where)
    sinks = None if sink is None else torch.tensor([sink], device=where)
    out, lse = merged(buffers, form, 2, sinks, backend)
    assert out.eq(0).all() and lse.flatten().tolist() == pytest.approx([-math.inf if sink is None else sink] * 2)


@pytest.mark.parametrize("backend", BACKENDS)
@on_each_device
def test_sinks_with_gaps(where: str, backend: str) -> None:
    states, _, _ = drawn(3)
    heads = states[0][0].shape[1]
    sinks = torch.linspace(-1, 1, 3 * heads, device=where)
    buffers, form = buffers_of(states, where)
    got = merged(buffers, form, len(states), sinks[::3], backend)
    wanted = merged(buffers, form, len(states), sinks[::3].contiguous(), backend)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 8), (1, 1, 1), (3, 5, 7), (16, 64, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_buffer_has_both_parts_aligned_and_apart(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    form = StateForm(*shape, dtype)
    out_bytes, lse_bytes = math.prod(shape) * dtype.itemsize, shape[0] * shape[1] * 4
    assert form.lse_at % ALIGNED == form.nbytes % ALIGNED == 0
    assert out_bytes <= form.lse_at < out_bytes + ALIGNED
    assert form.lse_at + lse_bytes <= form.nbytes < form.lse_at + lse_bytes + ALIGNED


def test_least_bytes_by_hand() -> None:
    """Of 4 ranks, each merges a quarter: it needs three quarters of the states, and three quarters of the rows."""
    form = StateForm(8, 2, 16, torch.bfloat16)
    assert least_bytes(form, 4) == 3 * (16 * (16 * 2 + 4) + 16 * 16 * 2) // 4 and least_bytes(form, 1) == 0
