"""What all benchmarks share: the timer, the comparison with the reference, rows, and the run over the cases.

On a GPU a timing replays a CUDA graph over inputs that exceed the last cache; on a CPU it uses the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .machine import machine
from .report import Row

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Percentiles of one call's time, in microseconds."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> Timing:
        if len(microseconds) == 1:
            return cls(microseconds[0], microseconds[0], microseconds[0], 1)
        cuts = statistics.quantiles(microseconds, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7], len(microseconds))


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory: the L2 of a GPU; 64 MiB is assumed for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64 * 2**20


def copies_for(size: int, device: torch.device, most: int = 8) -> int:
    """How many inputs to use in turn: on a GPU, enough to exceed three times its last cache.

    Args:
        size: bytes that one call moves.
        device: where the calls run.
        most: upper limit.
    """
    return 1 if device.type == "cpu" else min(most, -(-3 * cache_bytes(device) // max(size, 1)))


def check_rows(name: str, case: str, call: Call, out: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Run a call that fills `out`, and compare `out` with the reference, bit by bit.

    Args:
        name, case: names of the implementation and of the case, for the message.
        call: the call.
        out: tensors that the call fills; overwritten with NaN before it.
        reference: the expected contents.

    Raises:
        ArithmeticError: `out` differs from the reference.
    """
    for tensor in out:
        tensor.fill_(float("nan"))
    call()
    if not all(torch.equal(actual, expected) for actual, expected in zip(out, reference, strict=True)):
        raise ArithmeticError(f"{name} is not the reference on {case}")


def time_calls(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.2, graph: bool = True, alone: bool = False
) -> Timing:
    """Time one call, taking the given ones in turn.

    Args:
        calls: the same work on different memory, see `copies_for`.
        device: where the calls run.
        seconds: approximate time to measure, after a warm-up.
        graph: on a GPU, whether the calls can be captured in a CUDA graph, which excludes the host's time.
        alone: on a GPU, whether each call has a graph of its own and is timed by itself, its launch included.

    Returns:
        Percentiles over the samples. On a GPU with a graph a sample is one replay of all calls, unless `alone`.
    """
    for call in calls:
        call()
    if device.type == "cpu":
        return time_on_cpu(calls, seconds)
    torch.cuda.synchronize(device)
    works: list[Call]
    if not graph:
        works = [lambda: [call() for call in calls]]
    else:
        works = [captured([call]) for call in calls] if alone else [captured(calls)]
    for work in works:
        work()
    torch.cuda.synchronize(device)
    samples: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(samples) < 400:
        events = []
        if alone:  # the GPU sleeps for a millisecond, so that the launch's host time is not between the events
            torch.cuda._sleep(2_000_000)
        for work in works * (5 if graph else 1):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize(device)
        samples += [1e3 * start.elapsed_time(stop) * len(works) / len(calls) for start, stop in events]
    return Timing.of(samples)


def captured(calls: Sequence[Call]) -> Call:
    """Capture calls in one CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def time_on_cpu(calls: Sequence[Call], seconds: float) -> Timing:
    """Time calls by the clock, at least 5 and at most about 100 of them."""
    samples: list[float] = []
    end = time.monotonic() + seconds
    while len(samples) < 5 or (time.monotonic() < end and len(samples) < 100):
        for call in calls:
            begin = time.perf_counter()
            call()
            samples.append(1e6 * (time.perf_counter() - begin))
    return Timing.of(samples)


def row_of(
    benchmark: str,
    case: str,
    implementation: str,
    timing: Timing,
    device: torch.device,
    *,
    size: int = 0,
    share_of_cast: float = 0.0,
    against_loop: float = 0.0,
    against_token: float = 0.0,
    launches: float = 0.0,
    error: float = 0.0,
    peer_version: str = "",
    reason: str = "",
) -> Row:
    """A row of results; `size` is its `bytes`, the other arguments are those of `Row`."""
    return Row(
        benchmark=benchmark, case=case, implementation=implementation,
        p20_us=round(timing.p20, 2), p50_us=round(timing.p50, 2), p80_us=round(timing.p80, 2), samples=timing.samples,
        bytes=size, gb_per_s=round(size / timing.p50 / 1e3, 1) if timing.p50 else 0.0,
        share_of_cast=round(share_of_cast, 4), against_loop=round(against_loop, 2),
        against_token=round(against_token, 2), launches=round(launches, 3), error=float(f"{error:.3g}"),
        peer_version=peer_version, reason=reason, **machine(device.type),
    )  # fmt: skip


class Named(Protocol):
    """A case of any benchmark."""

    @property
    def name(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Named)
Measure = Callable[..., list[Row]]
"""`measure(case, device, seconds=…)`: the rows of one case."""


def run_cases(
    cases: Callable[[torch.device], Sequence[AnyCase]],
    measure: Measure,
    device: torch.device,
    *,
    only: str = "",
    seconds: float = 0.2,
    progress: Callable[[Sequence[AnyCase]], Iterable[AnyCase]] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure the cases of a benchmark whose name contains `only`.

    Args:
        cases: gives the cases that a device can measure.
        measure: gives the rows of a case.
        device: where the calls run.
        only: part of a case's name; empty selects all cases.
        seconds: approximate time to measure each implementation.
        progress: iterates over the selected cases and shows the progress, see `bench.progress`.
        keep: called with the rows of each case, once they are measured.

    Raises:
        ValueError: no case's name contains `only`, or the device cannot run the benchmark.
        ArithmeticError: an implementation's rows are not the reference's.
    """
    known = cases(device)
    selected = [case for case in known if only in case.name]
    if not selected:
        raise ValueError(f"--case is {only!r}; accepted: part of one of {', '.join(case.name for case in known)}")
    rows: list[Row] = []
    for case in selected if progress is None else progress(selected):
        measured = measure(case, device, seconds=seconds)
        if keep is not None:
            keep(measured)
        rows += measured
    return rows
