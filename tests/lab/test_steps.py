"""The kernels of chapter 07: each equals the reference bit for bit, and none reads outside the pools."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvgather.bench import steps as bench
from kvgather.cases import Case, build
from kvgather.lab import steps
from kvgather.plan import GatherPlan, PlanError
from tests.where import on_each_device

CASE = Case(page_size=16, num_heads=2, k_dim=16, v_dim=16, lengths=(19, 0, 3, 16), starts=(3, 0, 30, 0))
each_step = pytest.mark.parametrize("step", steps.STEPS, ids=lambda step: step.name.split()[0])
each_layout = pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])


@pytest.mark.triton
@on_each_device
@each_step
@each_layout
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_every_row_equals_the_reference(step, layout, out_dtype, where):
    built = build(replace(CASE, layout=layout, out_dtype=out_dtype, spare_rows=2), where)
    out = [torch.full((built.case.total_tokens, 2, 16), -7.0, dtype=out_dtype, device=where) for _ in range(2)]
    want = [tensor.clone() for tensor in out]
    built.cache.gather(built.plan, out=(want[0], want[1]), out_dtype=out_dtype, backend="torch")
    steps.gather(step, built.cache, built.plan, (out[0], out[1]))
    for got, expected in zip(out, want, strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        assert (got[-2:] == -7).all()


@pytest.mark.triton
@each_step
@each_layout
def test_nothing_is_read_outside_a_tensor(step, layout):
    from kvgather.lab.trace import trace

    built = build(replace(CASE, layout=layout, out_dtype=torch.float32, page_size=32), "cpu")
    out = torch.empty(2, built.case.total_tokens, 2, 16)
    with trace() as t:
        steps.gather(step, built.cache, built.plan, (out[0], out[1]))
    assert len(t.accesses) > 0
    assert t.violations == []


@pytest.mark.triton
@each_layout
def test_the_benchmark_has_a_row_for_every_step_and_limit(monkeypatch, layout):
    monkeypatch.setattr(bench, "token_per_program", bench.ours)  # under the interpreter it truncates bfloat16
    case = replace(CASE, layout=layout, lengths=(19, 3), starts=())
    rows = bench.measure(case, torch.device("cpu"), seconds=0.001)
    names = ["0 token per program", *(step.name for step in steps.STEPS), "5 kvgather"]
    assert [row.implementation for row in rows] == [*names, "contiguous cast", "contiguous copy"]
    assert {row.case for row in rows} == {case.name}
    assert rows[0].against_token == 1
    assert all(row.p50_us > 0 for row in rows)


@pytest.mark.triton
def test_a_wrong_row_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(bench, "token_per_program", lambda built, out: lambda: out[1].zero_())
    with pytest.raises(ArithmeticError, match="0 token per program is not the reference on NHD-2x16"):
        bench.measure(replace(CASE, lengths=(19, 3), starts=()), torch.device("cpu"), seconds=0.001)


def test_the_benchmark_requires_a_gpu():
    with pytest.raises(ValueError, match="--device is cpu; accepted with steps: cuda"):
        bench.run(torch.device("cpu"))
    assert [case.layout for case in bench.cases(torch.device("cuda"))] == ["SHUFFLE", "NHD"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "HND"}, "cache has layout HND; accepted: NHD, SHUFFLE"),
        ({"dtype": torch.bfloat16}, "cache holds torch.bfloat16; accepted: torch.float8"),
        ({"num_heads": 3}, "3 heads, K of 16 and V of 16; accepted: powers of two"),
        ({"v_dim": 32}, "K of 16 and V of 32; accepted: powers of two"),
        ({"v_kind": "per-head"}, r"v_scale is \[2\]; accepted: one element"),
        ({"k_kind": "none"}, "k_scale is None; accepted: one element"),
        ({"pool_style": "padded"}, r"key_cache has strides \[.*\]; accepted: contiguous tensors"),
    ],
)
def test_caches_that_the_steps_do_not_support_are_rejected(change, message):
    case = replace(CASE, **change)
    built = build(case, "cpu")
    out = tuple(torch.empty(case.total_tokens, case.num_heads, dim) for dim in (case.k_dim, case.v_dim))
    with pytest.raises(ValueError, match=message):
        steps.gather(steps.STEPS[1], built.cache, built.plan, (out[0], out[1]))


def rows(short=0, **named):
    """An output for K's or V's rows of CASE, `short` rows too short; `named` overrides heads, dim and dtype."""
    sizes = {"heads": 2, "dim": 16, "dtype": torch.float32} | named
    return torch.zeros(CASE.total_tokens - short, sizes["heads"], sizes["dim"], dtype=sizes["dtype"])


@each_step
@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (
            (rows(short=1), rows()),
            ValueError,
            r"out\[0\] has shape \[37, 2, 16\]; accepted: at least 38 rows of",
        ),
        ((rows(), rows(heads=1)), ValueError, r"out\[1\] has shape \[38, 1, 16\]; accepted: at least 38 rows"),
        ((rows(), rows(dim=8)), ValueError, r"out\[1\] has shape \[38, 2, 8\]; accepted: at least 38 rows"),
        ((rows(dim=32)[..., ::2], rows()), ValueError, r"out\[0\] has strides \[64, 32, 2\]; accepted: contiguous"),
        ((rows(dtype=torch.float64), rows()), TypeError, r"out\[0\] has dtype float64; accepted: bfloat16, float16"),
        ((rows(), rows().to("meta")), ValueError, r"out\[1\] is on meta; accepted: cpu"),
        ((rows(), None), TypeError, r"out\[1\] is NoneType None; accepted: a torch.Tensor"),
        ((rows(),), TypeError, r"out is tuple with tensors; accepted: a pair of tensors"),
        (None, TypeError, r"out is NoneType None; accepted: a pair of tensors"),
    ],
    ids=["short", "heads", "dim", "strides", "dtype", "device", "none", "one", "no pair"],
)
def test_an_output_of_the_wrong_form_is_rejected(step, out, error, message):
    built = build(CASE, "cpu")
    with pytest.raises(error, match=message):
        steps.gather(step, built.cache, built.plan, out)


def test_outputs_that_share_memory_are_rejected():
    built, out = build(CASE, "cpu"), rows()
    with pytest.raises(ValueError, match=r"out\[1\] shares memory with a pool or the other output; accepted: memory"):
        steps.gather(steps.STEPS[0], built.cache, built.plan, (out, out))


@each_step
def test_a_plan_for_another_cache_is_rejected(step):
    built = build(CASE, "cpu")
    other = build(replace(CASE, page_size=32), "cpu").plan
    with pytest.raises(ValueError, match="plan was made for page_size 32; accepted: the cache's, 16"):
        steps.gather(step, built.cache, other, (rows(), rows()))
    larger = replace(built.plan, num_blocks=built.plan.num_blocks + 1)
    with pytest.raises(ValueError, match=r"plan was made for a pool of \d+ blocks; accepted: at most the cache's"):
        steps.gather(step, built.cache, larger, (rows(), rows()))
    with pytest.raises(TypeError, match="plan is NoneType None; accepted: a GatherPlan"):
        steps.gather(step, built.cache, None, (rows(), rows()))
    bad = GatherPlan.build(
        torch.tensor([[built.plan.num_blocks]]), torch.tensor([0, 3]), page_size=16, num_blocks=built.plan.num_blocks
    )
    with pytest.raises(PlanError, match="block_table"):
        steps.gather(step, built.cache, bad, (rows(), rows()))


@pytest.mark.parametrize(("lanes", "warps"), [(32, [4, 2, 2, 16]), (64, [4, 1, 1, 8])])
def test_a_lane_of_a_tile_has_16_codes_of_k(lanes, warps):
    assert [step.num_warps(16, 8, 64, lanes) for step in steps.STEPS] == warps
