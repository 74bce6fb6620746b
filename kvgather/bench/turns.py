"""Timing implementations in turns, so that a change of the GPU's clock affects all of them.

`time_in_turns` gives GPU time; `time_eagerly` the time of a call in a loop of calls, the host's or the GPU's, whichever
is longer; `time_on_host` the time until a call returns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from .runner import Call, Timing, captured

EAGER_SECONDS = 0.02
"""Length of one sample of eager calls: the GPU's work after the last launch is a small part of it."""
HOST_BATCH = 8
"""Calls between two synchronizations: few, so that the launch queue never fills and no launch blocks."""

CPU_TURNS = 15
"""Least turns on a CPU: a median over fewer moves with whatever else the machine does."""


def time_in_turns(ways: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float) -> dict[str, Timing]:
    """GPU time of one call of each implementation, in turns.

    Args:
        ways: each implementation's calls on different memory, as in `time_calls`; captured in one CUDA graph each.
        device: where they run.
        seconds: approximate time to measure each implementation, after a warm-up.
    """
    for calls in ways.values():
        for call in calls:
            call()
    if device.type == "cpu":
        return _in_turns_on_cpu(ways, seconds)
    torch.cuda.synchronize(device)
    replays = {name: captured(calls) for name, calls in ways.items()}
    for replay in replays.values():
        replay()
    torch.cuda.synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end, rounds = time.monotonic() + seconds * len(ways), 0
    while rounds < 2 or (time.monotonic() < end and rounds < 100):
        rounds += 1
        # The GPU sleeps, so that the host time of the first replay's launch is not between its events.
        torch.cuda._sleep(200_000)
        events = []
        for name, replay in replays.items():
            for _ in range(3):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                replay()
                stop.record()
                events.append((name, start, stop))
        torch.cuda.synchronize(device)
        for name, start, stop in events:
            samples[name].append(1e3 * start.elapsed_time(stop) / len(ways[name]))
    return {name: Timing.of(times) for name, times in samples.items()}


def _in_turns_on_cpu(ways: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, Timing]:
    """One call of each implementation after the other, at least `CPU_TURNS` times, every second time in reverse."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end, turn = time.monotonic() + seconds * len(ways), 0
    while turn < CPU_TURNS or (time.monotonic() < end and turn < 400):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            call = ways[name][turn % len(ways[name])]
            begin = time.perf_counter()
            call()
            samples[name].append(1e6 * (time.perf_counter() - begin))
        turn += 1
    return {name: Timing.of(times) for name, times in samples.items()}


def time_eagerly(ways: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float) -> dict[str, Timing]:
    """Time one call in a host loop that launches call after call and synchronizes once, at the end.

    Args:
        ways: each implementation's calls on different memory, as in `time_calls`.
        device: where they run.
        seconds: approximate time to measure each implementation, after a warm-up.

    Returns:
        Percentiles over loops of about `EAGER_SECONDS`, the implementations in turns: per call, the host's time or the
        GPU's, whichever is longer.
    """
    loops = {}
    for name, calls in ways.items():
        _loop(calls, device)  # compiles
        once = _loop(calls, device) * len(calls)
        loops[name] = list(calls) * max(1, round(1e6 * EAGER_SECONDS / once))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end, rounds = time.monotonic() + seconds * len(ways), 0
    while rounds < 3 or (time.monotonic() < end and rounds < 200):
        rounds += 1
        for name, calls in loops.items():
            samples[name].append(_loop(calls, device))
    return {name: Timing.of(times) for name, times in samples.items()}


def _loop(calls: Sequence[Call], device: torch.device) -> float:
    """Time per call of one loop over all calls, in µs."""
    _synchronize(device)
    begin = time.perf_counter()
    for call in calls:
        call()
    _synchronize(device)
    return 1e6 * (time.perf_counter() - begin) / len(calls)


def time_on_host(ways: Mapping[str, Call], device: torch.device, *, seconds: float) -> dict[str, Timing]:
    """Time until one call returns, without the work that it launches.

    Args:
        ways: each implementation's call; each runs `HOST_BATCH` times per turn.
        device: where they launch.
        seconds: approximate time to measure each implementation, after a warm-up.
    """
    for call in ways.values():
        for _ in range(HOST_BATCH):
            call()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end, rounds = time.monotonic() + seconds * len(ways), 0
    while rounds < 2 or time.monotonic() < end:
        rounds += 1
        for name, call in ways.items():
            _synchronize(device)
            for _ in range(HOST_BATCH):
                begin = time.perf_counter_ns()
                call()
                samples[name].append((time.perf_counter_ns() - begin) / 1e3)
    _synchronize(device)
    return {name: Timing.of(times) for name, times in samples.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
