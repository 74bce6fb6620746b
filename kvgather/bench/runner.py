"""Timing: on a GPU by replaying a CUDA graph over inputs that do not fit in its cache, on a CPU by the clock."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, TypeVar

import torch

from ..device import triton_available
from .report import Row

Call = Callable[[], object]
COMMIT = "KVGATHER_COMMIT"
"""The environment variable that says which commit this is, for a copy of which git does not know."""


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
    """The size of the last cache in front of memory: the L2 of a GPU, 64 MiB assumed for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64 * 2**20


def time_calls(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.2, graph: bool = True, alone: bool = False
) -> Timing:
    """Time one call, taking the given ones in turn.

    Args:
        calls: the same work on different memory; as many as it takes to leave the cache.
        device: where they run.
        seconds: about how long to measure, after a warm-up.
        graph: on a GPU, whether the calls can be captured in a CUDA graph, which takes the host's time out.
        alone: on a GPU, whether each call is a graph of its own and is timed by itself, its launch included.

    Returns:
        Percentiles over the samples; on a GPU with a graph a sample is a replay of all calls, unless each is alone.
    """
    for call in calls:
        call()
    if device.type == "cpu":
        return _time_on_cpu(calls, seconds)
    torch.cuda.synchronize(device)
    works: list[Call]
    if not graph:
        works = [lambda: [call() for call in calls]]
    else:
        works = [_captured([call]) for call in calls] if alone else [_captured(calls)]
    for work in works:
        work()
    torch.cuda.synchronize(device)
    samples: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(samples) < 400:
        batch = []
        if alone:  # the GPU waits a millisecond, so that the host's time to ask for it is not between the events
            torch.cuda._sleep(2_000_000)
        for work in works * (5 if graph else 1):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            stop.record()
            batch.append((start, stop))
        torch.cuda.synchronize(device)
        samples += [1e3 * start.elapsed_time(stop) * len(works) / len(calls) for start, stop in batch]
    return Timing.of(samples)


def _captured(calls: Sequence[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _time_on_cpu(calls: Sequence[Call], seconds: float) -> Timing:
    samples: list[float] = []
    end = time.monotonic() + seconds
    while len(samples) < 5 or (time.monotonic() < end and len(samples) < 100):
        for call in calls:
            begin = time.perf_counter()
            call()
            samples.append(1e6 * (time.perf_counter() - begin))
    return Timing.of(samples)


class Named(Protocol):
    """A case of any benchmark."""

    @property
    def name(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Named)


def run_cases(
    cases: Sequence[AnyCase],
    measure: Callable[[AnyCase], list[Row]],
    *,
    only: str = "",
    progress: Callable[[str], None] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure the cases whose name holds `only`.

    Args:
        cases: all there are.
        measure: gives a case's rows.
        only: part of a case's name; empty is all.
        progress: called with a line before each case, such as `[3/72] NHD-8x64-…`.
        keep: called with each case's rows when they were measured.

    Raises:
        ValueError: no case's name holds `only`.
    """
    chosen = [case for case in cases if only in case.name]
    if not chosen:
        raise ValueError(f"--case is {only!r}; accepted: part of one of {', '.join(case.name for case in cases)}")
    rows: list[Row] = []
    for nth, case in enumerate(chosen, 1):
        if progress is not None:
            progress(f"[{nth}/{len(chosen)}] {case.name}")
        measured = measure(case)
        if keep is not None:
            keep(measured)
        rows += measured
    return rows


class Machine(TypedDict):
    """A row's columns about where and when."""

    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


@functools.cache
def machine(device_type: str) -> Machine:
    """What a row says about where it was measured: device, driver, versions, commit and date."""
    import importlib.metadata

    if device_type == "cuda":
        name, driver = (
            torch.cuda.get_device_name(),
            _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    else:
        name, driver = f"{_cpu_name()}, {torch.get_num_threads()} threads", ""
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if triton_available() else "",
        "commit": os.environ.get(COMMIT) or _commit_of(Path(__file__).resolve()),
        "date": datetime.date.today().isoformat(),
    }


def _commit_of(file: Path) -> str:
    """The commit of a clone of this repository that a file of the package is in; nothing anywhere else.

    An installed copy may be inside another repository's folder: that one does not track it, or has it deeper.
    """
    package = file.parents[1]
    if not _line("git", "-C", str(package), "ls-files", "--error-unmatch", str(file)):
        return ""
    top = _line("git", "-C", str(package), "rev-parse", "--show-toplevel")
    if not top or not Path(top).is_dir() or not package.parent.samefile(top):
        return ""
    return _line("git", "-C", str(package), "rev-parse", "--short", "HEAD")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _line(*command: str) -> str:
    """The first line a command prints, or nothing where there is no such command."""
    try:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=variables)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()
