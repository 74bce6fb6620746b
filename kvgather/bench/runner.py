"""Timing: on a GPU by replaying a CUDA graph over inputs that do not fit in its cache, on a CPU by the clock."""

from __future__ import annotations

import datetime
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..device import triton_available

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
    """The size of the last cache in front of memory: the L2 of a GPU, 64 MiB assumed for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64 * 2**20


def time_calls(calls: Sequence[Call], device: torch.device, *, seconds: float = 0.2, graph: bool = True) -> Timing:
    """Time one call, taking the given ones in turn.

    Args:
        calls: the same work on different memory; as many as it takes to leave the cache.
        device: where they run.
        seconds: about how long to measure, after a warm-up.
        graph: on a GPU, whether the calls can be captured in a CUDA graph, which takes the host's time out.

    Returns:
        Percentiles over the samples; on a GPU with a graph a sample is a replay of all calls.
    """
    for call in calls:
        call()
    if device.type == "cpu":
        return _time_on_cpu(calls, seconds)
    torch.cuda.synchronize(device)
    work: Call = _captured(calls) if graph else (lambda: [call() for call in calls])
    work()
    torch.cuda.synchronize(device)
    samples: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(samples) < 400:
        batch = []
        for _ in range(5 if graph else 1):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            stop.record()
            batch.append((start, stop))
        torch.cuda.synchronize(device)
        samples += [1e3 * start.elapsed_time(stop) / len(calls) for start, stop in batch]
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


@functools.cache
def machine(device_type: str) -> dict[str, str]:
    """What a row says about where it was measured: device, driver, versions, commit and date."""
    import importlib.metadata

    if device_type == "cuda":
        name, driver = (
            torch.cuda.get_device_name(),
            _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    else:
        name, driver = f"{_cpu_name()}, {torch.get_num_threads()} threads", ""
    here = Path(__file__).parent
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if triton_available() else "",
        "commit": _line("git", "-C", str(here), "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


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
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()
