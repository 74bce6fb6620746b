"""The prefix benchmark: implementations are compared with the reference, and rows with the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from kvgather.bench import prefix, prefix_targets, turns
from kvgather.bench.report import Row, table
from kvgather.cases.prefix import CPU_CASES, PrefixCase, build_prefix, cases
from tests.where import on_each_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = PrefixCase("reach", q_heads=4, kv_heads=2, head_dim=16, new=(3, 3), cached=(16, 16))
GPU_CASES = cases(CUDA)
PARTS = {part: [case for case in GPU_CASES if case.part == part] for part in {case.part for case in GPU_CASES}}


def row(case: PrefixCase, implementation: str, microseconds: float, size: int = 0) -> Row:
    return Row(
        "prefix", case.name, implementation, microseconds, microseconds, microseconds, 9, size, 0, 0, 0, 0,
        "NVIDIA H100 80GB HBM3", "580", "2.11.0", "3.6.0", "abc", "2026-11-22",
    )  # fmt: skip


def rows_of(part: Sequence[PrefixCase], **microseconds: float) -> list[Row]:
    return [row(case, name, time) for case in part for name, time in microseconds.items()]


def line(text: str, beginning: str) -> str:
    (matching,) = (each for each in text.splitlines() if each.startswith(beginning))
    return matching


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_a_cpu_compares_and_times_tiny_batches(case: PrefixCase) -> None:
    assert case in cases(CPU)
    rows = prefix.measure(case, CPU, seconds=0.001)
    names = [row.implementation for row in rows]
    assert names[0] == "gather" and names[1] == ("auto" if case.workspace is None else "gather, workspace 64")
    assert names[2:] == (
        ["dense, no gather", "dense, no gather, cached part"] if case.part == "reach" else []
    )  # fmt: skip
    for each in rows:
        assert (each.benchmark, each.case, each.bytes) == ("prefix", case.name, case.read_bytes)
        assert 0 < each.p20_us <= each.p50_us <= each.p80_us and each.samples >= 5
    assert "Left out" in prefix.summary(rows)
    assert table(rows)


@pytest.mark.parametrize("which", ["no_gather", "cached_part"])
def test_a_wrong_implementation_is_not_timed(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = prefix.dense_attention

    def wrong(*tensors: torch.Tensor, backend: str, causal: bool, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*tensors, backend=backend, causal=causal, **more)
        return (out if backend == "torch" or causal == (which == "cached_part") else out * 1.02), lse

    monkeypatch.setattr(prefix, "dense_attention", wrong)
    with pytest.raises(ArithmeticError, match=r"dense, no gather.* is not the reference on reach-.*: error 0.02"):
        prefix.measure(TINY, CPU, seconds=0.001)


def test_nan_is_an_error() -> None:
    rows = torch.ones(3, 2, 4)
    prefix.check("x", TINY, rows * 1.009, rows)
    for actual in (rows * 1.011, rows * torch.nan):
        with pytest.raises(ArithmeticError, match="x is not the reference on reach-"):
            prefix.check("x", TINY, actual, rows)


@pytest.mark.triton
@on_each_device
@pytest.mark.parametrize("which", [0, 1])
def test_the_implementations_for_gpus_are_the_reference_too(which: int, where: str) -> None:
    """In the interpreter: everything except the times."""
    case = (TINY, replace(TINY, new=(2,), cached=(9,), kind="per-token-head", layout="SHUFFLE"))[which]
    built = build_prefix(case, torch.device(where), 0)
    expected = prefix.reference(built)
    implementations = prefix.implementations(case, CUDA)
    assert list(implementations) == [
        "direct", "gather", "hybrid", "auto", "token per program, dense", "dense, no gather",
        "dense, no gather, cached part",
    ]  # fmt: skip
    for name, prepare in implementations.items():
        call = prepare(built)  # compares the cached part with plain torch
        if not name.endswith("cached part"):
            prefix.check(name, case, call(), expected)


@pytest.mark.triton
@on_each_device
def test_the_read_limit_reads_everything(where: str) -> None:
    from kvgather.bench.limits import read, read_results

    words = torch.randint(-(2**15), 2**15, (1000,), dtype=torch.int32, device=where)
    tile = (256, 4)
    out = read_results(words, tile)
    read(words, out, tile)
    assert out.tolist() == [int(part.sum()) for part in words.split(256)]


def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake clock in place of a GPU."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            self.at = len(order)

        def elapsed_time(self, other: Event) -> float:
            return 0.012 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("asleep"))
    monkeypatch.setattr(turns, "captured", lambda calls: lambda: [call() for call in calls])
    ways = {name: [partial(order.append, name)] * 2 for name in ("a", "b")}
    timings = turns.time_in_turns(ways, CUDA, seconds=1e-9)
    assert order[8:] == (["asleep"] + ["a"] * 6 + ["b"] * 6) * 2
    assert list(timings) == ["a", "b"]
    for timing in timings.values():
        assert timing.samples == 6 and timing.p20 == timing.p50 == timing.p80 == pytest.approx(12)


def test_reached_and_missed_targets() -> None:
    decode, sixteen, more, most = PARTS["reach"]
    (workspace,) = PARTS["workspace"]
    bounded = f"gather, workspace {workspace.workspace}"
    rows = [
        *rows_of([decode], direct=100, gather=300, auto=101, **{"read limit": 70}),
        *rows_of([sixteen], direct=190, gather=400, auto=190),
        *rows_of([more], direct=900, gather=851, auto=851),
        *rows_of([most], direct=4000, gather=2800, auto=2800),
        *rows_of(PARTS["auto"][3:], direct=10, gather=20, auto=10.4),
        *rows_of(PARTS["auto"][:3], direct=30, gather=20, auto=21.9),
        *rows_of(PARTS["window"], direct=10, gather=20),
        *rows_of([workspace], direct=10, gather=100, **{bounded: 116}),
        row(workspace, f"{bounded}: peak memory", 0, workspace.allowed_peak_bytes),
        row(workspace, "gather: peak memory", 0, 2**30),
    ]
    text = prefix.targets(rows)
    for beginning, verdict, measurement in (
        ("1 new", "  reached", "0.70: direct 100.0 µs, limit 70.0 µs"),
        ("16 new", "  reached", "190.0 µs, 0.66 of the best peer (direct 190.0, gather 400.0, auto 190.0)"),
        ("128 new", "  NOT reached", "851.0 µs"),
        ("512 new", "  reached", "2,800.0 µs, 0.77 of the best peer"),
        ("auto within 5%", "  reached", "27 of 30; not: auto-"),
        ("auto within 10%", "  reached", "30 of 30"),
        ("window 128, 1 new, direct", "  reached", "+0.0% to +0.0%"),
        ("window 128, 16 new, gather", "  reached", "65,536: 20.0"),
        ("workspace 32,768", "  NOT reached", "1.160 (116.0 against 100.0 µs)"),
        ("its peak memory", "  reached", "(gather 1024.00)"),
    ):
        assert verdict in line(text, beginning) and measurement in line(text, beginning), beginning
    worse = [replace(each, p50_us=22.1) if each.p50_us == 21.9 else each for each in rows]
    worse += rows_of(PARTS["auto"][3:4], direct=10, gather=20, auto=10.6)
    worse += rows_of([case for case in PARTS["window"] if case.cached[0] == 65536], direct=11.1, gather=18.1)
    worse.append(row(workspace, f"{bounded}: peak memory", 0, workspace.allowed_peak_bytes + 1))
    text = prefix.targets(worse)
    for beginning in ("auto within 5%", "auto within 10%", "window 128, 1 new, direct", "its peak memory"):
        assert "  NOT reached" in line(text, beginning), beginning
    assert "-9.5% to +0.0%" in line(text, "window 128, 1 new, gather")


def test_a_target_without_measurements_is_not_reached() -> None:
    text = prefix.targets(rows_of(PARTS["auto"][:2], direct=1, gather=2, auto=1))
    assert "reached" not in text
    assert "2 of 2" in line(text, "auto within 5%")
    header, *lines = text.splitlines()
    assert "to reach" in header
    assert all("not measured" in each for each in lines if not each.startswith("auto"))


def test_the_best_rule() -> None:
    rule = prefix_targets.best_rule
    assert rule([(8, 1, 2), (16, 1, 2), (32, 3, 2)]) == (16, 3, 1)
    assert rule([(8, 3, 2), (16, 3, 2)]) == (0, 2, 1)
    assert rule([(8, 1, 2), (16, 1, 2)]) == (16, 2, 1)
    assert rule([(8, 1, 2), (8, 3, 2), (8, 1, 2)]) == (8, 2, 1.5)


def test_the_crossing_of_each_head_dim() -> None:
    rows = [
        row(case, name, time)
        for case in (*PARTS["auto"], *PARTS["window"], *PARTS["reach"])
        for name, time in (("direct", case.rows), ("gather", 170), ("hybrid", 150))
    ]
    text = prefix.crossing(rows)
    assert "6.67" not in text
    assert "150.0 µs" in text
    for dim in (64, 128, 256):
        assert f"head dim {dim}, all keys: direct up to 128 rows (or any number below 256): within 5 % on" in text
    assert "head dim 64, a window: direct up to 128 rows (or any number below 512): within 5 % on 13 of 13" in text
    assert text in prefix.summary(rows) and prefix.targets(rows) in prefix.summary(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["reach", "workspace"])
def test_a_gpu_measures_with_limits_and_peaks(part: str) -> None:
    case = {
        "reach": replace(PARTS["reach"][0], cached=(1024,) * 16),
        "workspace": replace(PARTS["workspace"][0], cached=(8192,), workspace=2048),
    }[part]
    rows = {each.implementation: each for each in prefix.measure(case, CUDA, seconds=0.01)}
    if part == "reach":
        assert {"direct", "gather", "hybrid", "auto", "read limit", "contiguous copy"} <= set(rows)
        assert rows["read limit"].bytes == case.cached_bytes and rows["token per program, dense"].against_token == 1
    else:
        peak = partial("{}: peak memory".format)
        assert 0 < rows[peak("gather, workspace 2048")].bytes < rows[peak("gather")].bytes
    assert all(each.p50_us > 0 for each in rows.values() if not each.implementation.endswith("memory"))
