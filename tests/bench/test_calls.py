"""The engines' call next to upstream's form: both are compared with the reference, then timed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kvgather.bench import calls, gather, runner, turns
from kvgather.bench.implementations import engines_call, upstream_form
from kvgather.bench.report import Row
from kvgather.cases import Case, build
from kvgather.cases.measured import CALLS
from tests.where import on_each_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Case(num_heads=1, k_dim=16, v_dim=16, lengths=(3, 2), starts=(), out_dtype=torch.float32)
NAMES = ["kvgather", "cp_mha_gather_cache", "upstream form"]


def test_the_engines_calls_have_their_own_implementations() -> None:
    for case in CALLS:
        assert not gather.is_timed_alone(case, CUDA)
        assert list(gather._implementations(case, CUDA)) == NAMES


@pytest.mark.parametrize("megabytes", [50, 60])
def test_the_inputs_do_not_fit_in_the_cache(megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "cache_bytes", lambda device: megabytes * 2**20)
    for case in CALLS:
        moved = gather.moved_bytes(case)
        assert runner.copies_for(moved, CUDA, calls.MOST_COPIES) * moved > 2.5 * megabytes * 2**20


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
def test_rows_are_compared_with_upstreams_form(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, in the interpreter: everything except the times."""
    case = replace(TINY, layout=layout)
    monkeypatch.setattr(gather, "CALLS", (case,))
    monkeypatch.setattr(turns, "EAGER_SECONDS", 1e-6)
    rows = {row.implementation: row for row in gather.measure(case, CPU, seconds=1e-6)}
    eager = [name + ", eager" for name in NAMES[1:]]
    assert list(rows) == [*NAMES, *eager, "contiguous cast", "contiguous copy"]
    for name in (*NAMES, *eager):
        baseline = rows["upstream form, eager" if name in eager else "upstream form"]
        assert rows[name].against_token == pytest.approx(baseline.p50_us / rows[name].p50_us, rel=0.02, abs=0.01)
        assert rows[name].bytes == gather.moved_bytes(case) and rows[name].launches == 0


@pytest.mark.triton
@on_each_device
@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
@pytest.mark.parametrize("prepare", [engines_call, upstream_form])
def test_both_gather_the_reference(prepare, kind: str, where: str) -> None:
    built = build(replace(TINY, layout="SHUFFLE", k_kind=kind, v_kind=kind), where, values="normal")
    expected = built.cache.gather(built.plan, out_dtype=torch.float32, backend="torch")
    out = torch.full_like(expected[0], -7), torch.full_like(expected[1], -7)
    prepare(built, out)()
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.triton
def test_a_wrong_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "CALLS", (TINY,))
    wrong = dict(calls.IMPLEMENTATIONS) | {"upstream form": lambda built, out: lambda: out[0].zero_()}
    monkeypatch.setattr(gather, "IMPLEMENTATIONS", wrong)
    monkeypatch.setattr(gather, "time_calls_of_engines", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ArithmeticError, match="upstream form is not the reference"):
        gather.measure(TINY, CPU, seconds=1e-6)


def test_the_summary_compares_with_the_targets() -> None:
    times = {
        "kvgather": 14.0, "cp_mha_gather_cache": 16.1, "upstream form": 83.0, "cp_mha_gather_cache, eager": 41.5,
        "upstream form, eager": 83.0,
    }  # fmt: skip
    (case,) = (each for each in CALLS if each.name.startswith("NHD-8x64") and each.total_tokens == 16384)
    rows = [
        Row("gather", case.name, name, time, time, time, 9, 1, 1, 1, 0, 1, "d", "", "2", "3", "c", "2026-11-27")
        for name, time in times.items()
    ]
    assert calls.summary(rows).splitlines()[1:] == [
        case.name,
        "  eager 2.00 × (≥ 2 ×): reached",
        "  GPU 5.16 × (≥ 4 ×): reached",
        "  GPU 16.1 µs, planned 14.0 (≤ 16.0): NOT reached",
    ]
    other = [replace(row, case=CALLS[-2].name) for row in rows]  # without an eager target
    assert calls.summary(other).splitlines()[2:4] == ["  eager 2.00 ×", "  GPU 5.16 × (≥ 1 ×): reached"]
    assert calls.summary(rows[:-1]) == "" and gather.summary is calls.summary


class Clock:
    """A clock that advances only during calls, and the order of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, []
        clock = SimpleNamespace(
            perf_counter=lambda: self.now, monotonic=lambda: self.now, perf_counter_ns=lambda: round(1e9 * self.now)
        )
        monkeypatch.setattr(turns, "time", clock)
        monkeypatch.setattr(turns, "_synchronize", lambda device: self.order.append("wait"))

    def run(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.order.append(name)


def test_eager_calls_take_turns_in_loops_over_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ways = {
        "fast": [partial(clock.run, f"fast {copy}", 0.001) for copy in range(2)],
        "slow": [partial(clock.run, "slow", 0.05)],
    }
    timings = turns.time_eagerly(ways, CPU, seconds=0.03)
    assert (timings["fast"].p50, timings["slow"].p50) == (pytest.approx(1000), pytest.approx(50_000))
    assert timings["fast"].samples == timings["slow"].samples == 3
    a_loop = ["wait", *["fast 0", "fast 1"] * 10, "wait"]  # 20 ms
    assert clock.order[-3 * (len(a_loop) + 3) :] == 3 * [*a_loop, "wait", "slow", "wait"]


def test_host_times_end_when_the_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ways = {"a": partial(clock.run, "a", 0.001), "b": partial(clock.run, "b", 0.002)}
    timings = turns.time_on_host(ways, CPU, seconds=1e-9)
    assert (timings["a"].p50, timings["b"].p50) == (pytest.approx(1000), pytest.approx(2000))
    assert timings["a"].samples == timings["b"].samples == 2 * turns.HOST_BATCH
    one_round = ["wait", *["a"] * turns.HOST_BATCH, "wait", *["b"] * turns.HOST_BATCH]
    assert clock.order[2 * turns.HOST_BATCH :] == 2 * one_round + ["wait"]


@pytest.mark.gpu
def test_a_gpu_times_both_ways() -> None:
    rows = {row.implementation: row for row in gather.measure(CALLS[0], CUDA, seconds=0.02)}
    eager = [name + ", eager" for name in NAMES[1:]]
    assert {*NAMES, *eager} <= set(rows)
    assert all(rows[name].p50_us > 0 for name in rows)
    assert rows["upstream form, eager"].p50_us >= 0.9 * rows["upstream form"].p50_us
