"""Timing on all ranks: the calls of a way begin at once, ways take turns, and a time is that of the slowest rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from ...batch.capture import CaptureError
from ..runner import Call, Timing

SAMPLE = 0.1
"""Seconds of calls in a sample, as far as `MOST_CALLS` permit."""
MOST_CALLS, MOST_ROUNDS, LEAST_ROUNDS = 64, 50, 5
SLEEP = 2_000_000
"""Cycles, about 1 ms, that a GPU sleeps before a graph, so that its launch is not part of the time."""


@dataclass(frozen=True)
class Times:
    """Times of one call in microseconds, of the slowest rank.

    Attributes:
        graph: in replays of a CUDA graph; None without one.
        eager: in a loop on the host, which synchronizes at its end.
        no_graph: why there is no graph, or "".
    """

    graph: Timing | None
    eager: Timing
    no_graph: str


def time_on_ranks(ways: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float) -> dict[str, Times]:
    """Time one call of each way, in turns: all eagerly, then all in CUDA graphs.

    All ranks of the default group pass the same ways in the same order, and those that run a way equally many calls.

    Args:
        ways: each way's calls on different memory; none where this rank only waits.
        device: this rank's.
        seconds: approximate time to measure each way, eagerly and in graphs.
    """
    firsts = [_when_all_are_here(device, partial(_loop, calls, device)) for calls in ways.values() for _ in range(2)]
    once = largest(firsts[1::2], device)  # the first loop compiled
    loops, spent = {}, 0.0
    for (name, calls), microseconds in zip(ways.items(), once, strict=True):
        most = max(1, MOST_CALLS // max(len(calls), 1))
        once_around = max(microseconds, 1e-3) * max(len(calls), 1)
        repeats = min(max(1, round(1e6 * SAMPLE / once_around)), most)
        loops[name] = list(calls) * repeats
        spent += 1e-6 * once_around * repeats
    (spent,) = largest([spent], device)
    rounds = min(max(LEAST_ROUNDS, round(seconds * len(ways) / spent)), MOST_ROUNDS)
    eager = _rounds({name: partial(_loop, calls, device) for name, calls in loops.items()}, rounds, device)
    graphs, reasons = _captured(loops, device)
    replays = {name: partial(_replay, graph, len(loops[name]), device) for name, graph in graphs.items()}
    in_graphs = _rounds(replays, rounds, device) if replays else {}
    del replays
    for graph in graphs.values():
        if graph is not None:
            graph.reset()  # NCCL's group does not end while a graph has its kernels
    return {name: Times(in_graphs.get(name), eager[name], reasons[name]) for name in ways}


def start_together(device: torch.device) -> None:
    """Wait until all ranks are here and have nothing to do."""
    dist.all_reduce(torch.zeros(1, device=device))
    _synchronize(device)


def _when_all_are_here(device: torch.device, run: Callable[[], float]) -> float:
    start_together(device)
    return run()


def _rounds(runs: Mapping[str, Callable[[], float]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Percentiles of every run's samples, of the slowest rank."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_when_all_are_here(device, run))
    own = [Timing.of(times) for times in samples.values()]
    low, median, high = (largest([getattr(timing, p) for timing in own], device) for p in ("p20", "p50", "p80"))
    return {name: Timing(low[at], median[at], high[at], rounds) for at, name in enumerate(runs)}


def _loop(calls: Sequence[Call], device: torch.device) -> float:
    """Time per call of one loop, in µs; 0 without calls."""
    begin = time.perf_counter()
    for call in calls:
        call()
    _synchronize(device)
    return 1e6 * (time.perf_counter() - begin) / len(calls) if calls else 0.0


def _replay(graph: torch.cuda.CUDAGraph | None, calls: int, device: torch.device) -> float:
    """Time per call of one replay, in µs; 0 on a rank that only waits.

    The host's barrier lets ranks go some ten µs apart. They therefore meet again on the GPUs, after the sleep in which
    all have launched; a rank that waits takes part in that too.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP)
    dist.all_reduce(torch.zeros(1, device=device))
    begin.record()
    if graph is not None:
        graph.replay()
    end.record()
    torch.cuda.synchronize(device)
    return 1e3 * begin.elapsed_time(end) / calls if graph is not None else 0.0


def _captured(
    loops: Mapping[str, Sequence[Call]], device: torch.device
) -> tuple[dict[str, torch.cuda.CUDAGraph | None], dict[str, str]]:
    """A graph of each loop, None where this rank only waits; and why others have none, on whichever rank it failed."""
    if device.type != "cuda":
        return {}, dict.fromkeys(loops, "a CPU has no CUDA graphs")
    graphs: dict[str, torch.cuda.CUDAGraph | None] = {}
    reasons: dict[str, str] = {}
    for name, calls in loops.items():
        start_together(device)
        graph, reason = torch.cuda.CUDAGraph() if calls else None, ""
        if graph is not None:
            try:
                # Other threads, such as NCCL's watchdog, may use CUDA meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    for call in calls:
                        call()
            except (RuntimeError, CaptureError) as error:
                reason = str(error).strip().splitlines()[0]
        all_reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(all_reasons, reason)
        reasons[name] = next((f"{name}, rank {rank}: {said}" for rank, said in enumerate(all_reasons) if said), "")
        if not reasons[name]:
            graphs[name] = graph
            if graph is not None:
                graph.replay()
    _synchronize(device)
    return graphs, reasons


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of all ranks' values, one by one."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    numbers: list[float] = tensor.tolist()
    return numbers


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
