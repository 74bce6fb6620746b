"""Timing several ways to do one thing in turns, so that a GPU that slows down slows down all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from .runner import Call, Timing, _captured, _time_on_cpu


def time_in_turns(ways: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float) -> dict[str, Timing]:
    """Time one call of each way, a little of every way at a time.

    Args:
        ways: by name, the same work on different memory, as in `time_calls`; each way's calls are captured in one CUDA
            graph.
        device: where they run.
        seconds: about how long to measure each way, after a warm-up.
    """
    for calls in ways.values():
        for call in calls:
            call()
    if device.type == "cpu":
        return {name: _time_on_cpu(calls, seconds) for name, calls in ways.items()}
    torch.cuda.synchronize(device)
    replays = {name: _captured(calls) for name, calls in ways.items()}
    for replay in replays.values():
        replay()
    torch.cuda.synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end, rounds = time.monotonic() + seconds * len(ways), 0
    while rounds < 2 or (time.monotonic() < end and rounds < 100):
        rounds += 1
        # The GPU waits a little, so that the host's time to ask for the first replay is not between its events.
        torch.cuda._sleep(200_000)
        taken = []
        for name, replay in replays.items():
            for _ in range(3):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                replay()
                stop.record()
                taken.append((name, start, stop))
        torch.cuda.synchronize(device)
        for name, start, stop in taken:
            samples[name].append(1e3 * start.elapsed_time(stop) / len(ways[name]))
    return {name: Timing.of(times) for name, times in samples.items()}
