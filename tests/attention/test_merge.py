"""Merging: the parts make the whole, in any order and of any size, and an empty part leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from kvgather.attention.merge import RunningState, apply_sinks, merge_states
from kvgather.attention.reference import reference_attention
from tests.attention.batches import error as relative_error
from tests.where import interpreted

EPS = 2.0**-23


def state(*lse: float, dim: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of one head with these log-sum-exps."""
    return torch.randn(len(lse), 1, dim).to(dtype), torch.tensor(lse)[:, None]


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def test_by_hand() -> None:
    """Denominators 2 and 6: the second weighs three times as much."""
    out, lse = merge_states(
        torch.tensor([[[4.0]]]), torch.tensor([[math.log(2)]]), torch.tensor([[[8.0]]]), torch.tensor([[math.log(6)]])
    )
    torch.testing.assert_close(out, torch.tensor([[[7.0]]]))
    torch.testing.assert_close(lse, torch.tensor([[math.log(8)]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [0.0, -3.5, 1e4, -1e4, 1e30, -1e30])
@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf, -0.0])
def test_an_empty_side_leaves_the_other_as_it_is(garbage: float, held: float, dtype: torch.dtype) -> None:
    out, lse = state(held, held, dtype=dtype)
    out[0, 0, 0] = -0.0
    nothing = (torch.full_like(out, garbage), torch.full_like(lse, -math.inf))
    for got in (merge_states(out, lse, *nothing), merge_states(*nothing, out, lse)):
        assert same_bits(got[0], out) and same_bits(got[1], lse)


def test_two_empty_sides_are_zero_and_empty() -> None:
    nothing = (torch.full((2, 1, 3), math.nan), torch.full((2, 1), -math.inf))
    out, lse = merge_states(*nothing, *nothing)
    assert out.eq(0).all() and lse.eq(-math.inf).all()


@pytest.mark.parametrize("at", [0.0, 1e4, -1e4, 1e30, -1e30])
def test_stable_wherever_the_log_sum_exps_are(at: float) -> None:
    a, b = state(at), state(at)
    out, lse = merge_states(*a, *b)
    torch.testing.assert_close(out, (a[0] + b[0]) / 2)
    torch.testing.assert_close(lse, a[1] + math.log(2), rtol=4 * EPS, atol=1e-6)
    for other in (1e4, 1e30):  # the far smaller one does not count, and does not overflow
        small, large = state(-other), state(other)
        for merged in (merge_states(*small, *large), merge_states(*large, *small)):
            assert torch.equal(merged[0], large[0]) and torch.equal(merged[1], large[1])


def test_nan_that_was_seen_stays() -> None:
    out, lse = merge_states(torch.full((1, 1, 2), math.nan), torch.tensor([[math.nan]]), *state(1.0))
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("held", [0.0, -3.5, 1e30, -math.inf])
def test_plus_infinity_weighs_nothing(held: float) -> None:
    """FlashAttention 2 returns +inf and zeros for a row without keys."""
    out, lse = state(held, held)
    if held == -math.inf:
        out.zero_()
    nothing = (torch.zeros_like(out), torch.full_like(lse, math.inf))
    for got in (merge_states(out, lse, *nothing), merge_states(*nothing, out, lse)):
        assert same_bits(got[0], out) and same_bits(got[1], lse)
    both = merge_states(*nothing, *nothing)
    assert both[0].eq(0).all() and both[1].eq(-math.inf).all()


def test_a_row_of_nan_stays_nan_where_its_log_sum_exp_is_infinite() -> None:
    row = (torch.full((1, 1, 2), math.nan), torch.tensor([[math.inf]]))
    for got in (merge_states(*row, *state(1.0)), merge_states(*state(1.0), *row)):
        assert got[0].isnan().all() and got[1].isnan().all()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[pytest.mark.triton, interpreted])])
def test_adding_to_a_running_state(backend: str) -> None:
    held = [0.5, 0.5, 0.5, -math.inf, -math.inf, 2.0, 0.5]
    part = [math.inf, -math.inf, math.nan, math.inf, -1.0, 3.0, math.nan]
    (out, lse), (part_out, part_lse) = state(*held, dim=3), state(*part, dim=3)
    out[[3, 4]], part_out[[0, 1, 3]] = 0.0, 0.0
    part_out[2] = math.nan
    running = RunningState(7, 1, 3, torch.float32, torch.device("cpu"), backend)
    running.put(slice(0, 7), out, lse)
    running.add(slice(0, 7), part_out, part_lse)
    wanted, wanted_lse = merge_states(out, lse, part_out, part_lse)
    torch.testing.assert_close(running.out, wanted, equal_nan=True)
    torch.testing.assert_close(running.lse, wanted_lse, equal_nan=True)
    assert running.out[[0, 1, 3]].equal(out[[0, 1, 3]]) and running.out[2].isnan().all()


def test_the_log_sum_exp_of_a_running_state_is_fp32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert RunningState(1, 1, 1, torch.float32, torch.device("cpu")).lse.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_negative_bits_count() -> None:
    out, lse = (torch.randn(shape, dtype=torch.complex64).conj().imag for shape in ((3, 1, 2), (3, 1)))
    plain = (out.resolve_neg(), lse.resolve_neg())
    for got, wanted in zip(merge_states(out, lse, *plain), merge_states(*plain, *plain), strict=True):
        assert torch.equal(got, wanted) and not got.is_neg()


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_the_dtype_is_what_both_promote_to(a: torch.dtype, b: torch.dtype, wanted: torch.dtype) -> None:
    out, lse = merge_states(*state(0.3, dtype=a), *state(0.1, dtype=b))
    assert out.dtype == wanted and lse.dtype == torch.float32


def test_views_of_any_strides_and_no_rows() -> None:
    a, b = state(0.1, 0.2, 0.3), state(0.4, -0.5, 0.6)
    wanted = merge_states(*a, *b)
    strided = [torch.stack((t, t), -1)[..., 0] for t in (*a, *b)]
    got = merge_states(*strided)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    out, lse = merge_states(*(t[:0] for t in (*a, *b)))
    assert out.shape == (0, 1, 2) and lse.shape == (0, 1)


def attended(q: Tensor, k: Tensor, v: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """What one query saw in the keys of a subset, rounded to FP32."""
    ends = [torch.tensor([0, n]) for n in (1, int(which.sum()))]
    out, lse = reference_attention(q, k[which], v[which], *ends, softmax_scale=1.0)
    return out.float(), lse.float()


@given(keys=st.integers(1, 12), seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
def test_any_split_of_the_keys_merges_to_the_whole_in_any_order(keys: int, seed: int, spread: float) -> None:
    """Each query head of one query; the parts of a three-way split, some of them empty."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, heads, 4, generator=random) for n, heads in ((1, 4), (keys, 2), (keys, 2)))
    q *= spread
    part = torch.randint(3, (keys,), generator=random)
    a, b, c = (attended(q, k, v, part == i) for i in range(3))
    wanted, wanted_lse = attended(q, k, v, part >= 0)
    # A weight is e to an fp32 log-sum-exp, so its relative error is that number's absolute one: 4 roundings a merge.
    largest = max(1.0, float(wanted_lse.abs().max()), *(float(s[1].nan_to_num(0, 0, 0).abs().max()) for s in (a, b, c)))
    tolerance = 2 * 4 * EPS * largest * float(v.abs().max())
    for out, lse in (merge_states(*merge_states(*a, *b), *c), merge_states(*a, *merge_states(*b, *c))):
        torch.testing.assert_close(out, wanted, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=8 * EPS * largest)


GOOD: dict[str, Any] = {
    "out_a": torch.zeros(3, 2, 4),
    "lse_a": torch.zeros(3, 2),
    "out_b": torch.zeros(3, 2, 4),
    "lse_b": torch.zeros(3, 2),
}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"out_a": [1]}, TypeError, r"out_a is list \[1\]; accepted: a torch.Tensor"),
        ({"out_a": torch.zeros(3, 2)}, ValueError, r"out_a has shape \[3, 2\]; accepted: 3 dimensions"),
        ({"out_b": torch.zeros(3, 2, 4).double()}, TypeError, r"out_b has dtype float64; accepted: bfloat16, float16"),
        ({"lse_a": torch.zeros(3, 2).half()}, TypeError, r"lse_a has dtype float16; accepted: float32"),
        ({"lse_a": torch.zeros(2, 3)}, ValueError, r"lse_a has shape \[2, 3\]; accepted for out_a .*: \[3, 2\]"),
        ({"lse_b": torch.zeros(3, 2, 1)}, ValueError, r"lse_b has shape \[3, 2, 1\]; accepted: 2 dimensions"),
        ({"out_b": torch.zeros(1, 2, 4)}, ValueError, r"out_b has shape \[1, 2, 4\]; accepted for .*: \[3, 2, 4\]"),
        ({"lse_b": torch.zeros(3, 2, device="meta")}, ValueError, r"lse_b is on meta; accepted: cpu"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    merge_states(**GOOD)
    with pytest.raises(error, match=message):
        merge_states(**{**GOOD, **wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sink_is_a_part_without_values(dtype: torch.dtype) -> None:
    out, lse = state(0.5, -2.0, 1e4, -1e4, -math.inf, dtype=dtype)
    out[-1] = 0
    for sink in (0.3, -5.0, 1e4, -1e4):
        got, got_lse = apply_sinks(out, lse, torch.tensor([sink]))
        wanted, wanted_lse = merge_states(out, lse, torch.zeros_like(out), torch.full_like(lse, sink))
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(got_lse, wanted_lse)
        assert got.dtype == dtype


def test_sinks_at_the_ends() -> None:
    out, lse = state(0.5, -2.0)
    gone, at_sink = apply_sinks(out, lse, torch.tensor([1e4]))
    assert gone.eq(0).all() and at_sink.eq(1e4).all()
    kept, as_before = apply_sinks(out, lse, torch.tensor([-1e4]))
    assert torch.equal(kept, out) and torch.equal(as_before, lse)
    none = apply_sinks(out.zero_(), torch.full_like(lse, -math.inf), torch.tensor([-math.inf]))
    assert none[0].eq(0).all() and none[1].eq(-math.inf).all()


def test_each_head_has_its_sink_in_whatever_dtype() -> None:
    out, lse = torch.ones(2, 2, 3), torch.zeros(2, 2)
    got, got_lse = apply_sinks(out, lse, torch.tensor([0.0, -1e4], dtype=torch.bfloat16))
    assert got[:, 0].eq(0.5).all() and got[:, 1].eq(1).all()
    torch.testing.assert_close(got_lse, torch.tensor([[math.log(2), 0.0]] * 2))


@pytest.mark.gpu
def test_the_gpu_merges_as_the_cpu_does() -> None:
    a, b = state(0.5, -math.inf, 1e4, -3.0), state(0.1, 2.0, 1e4, -math.inf)
    there = merge_states(*(t.cuda() for t in (*a, *b)))
    for got, wanted in zip(there, merge_states(*a, *b), strict=True):
        torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[pytest.mark.triton, interpreted])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_running_state_adds_up(dtype: torch.dtype, backend: str) -> None:
    q, k, v = torch.randn(6, 2, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 5)
    state = RunningState(8, 2, 5, torch.float32, q.device, backend)
    for rows, start, end in ((slice(0, 6), 0, 9), (slice(0, 6), 9, 10), (slice(0, 6), 10, 20)):
        out, lse = reference_attention(
            q[rows], k[start:end].repeat(6, 1, 1), v[start:end].repeat(6, 1, 1), torch.arange(7, dtype=torch.int32),
            torch.arange(7, dtype=torch.int32) * (end - start),
        )  # fmt: skip
        state.add(rows, out.to(dtype), lse.float().t().contiguous().t())
    whole = reference_attention(
        q,
        k.repeat(6, 1, 1),
        v.repeat(6, 1, 1),
        torch.arange(7, dtype=torch.int32),
        torch.arange(7, dtype=torch.int32) * 20,
    )
    assert relative_error(state.out[:6], whole[0]) <= (1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(state.lse[:6].double(), whole[1], rtol=1e-5, atol=1e-5)
    assert state.out[6:].eq(0).all() and state.lse[6:].eq(-torch.inf).all()
    before = state.out.clone(), state.lse.clone()
    state.add(slice(0, 8), torch.zeros(8, 2, 5, dtype=dtype), torch.full((8, 2), -torch.inf))  # nothing more was seen
    assert torch.equal(state.out, before[0]) and torch.equal(state.lse, before[1])
