"""The engines' call next to upstream's form of it (our rewrite): a part of `kvgather bench gather`.

Upstream's form is timed as an engine launches it: `kernel[grid](…)` and nothing else. Rows named `…, eager` give the
time per call of a host loop: the host's or the GPU's, whichever is longer. All other rows give GPU time in a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..cases.measured import CALLS
from .implementations import Implementation, engines_call, ours, upstream_form
from .report import Row
from .runner import Call, Timing
from .turns import time_eagerly, time_in_turns

MOST_COPIES = 300
"""Copies of the smallest case's inputs, 0.6 MB each: they exceed three times the L2 of an H100 or H200 (50, 60 MB)."""
ENGINES_CALL, UPSTREAM, EAGER = "cp_mha_gather_cache", "upstream form", ", eager"
IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "kvgather": ours,
    ENGINES_CALL: engines_call,
    UPSTREAM: upstream_form,
}


def time_calls_of_engines(
    calls: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float
) -> dict[str, Timing]:
    """Time `IMPLEMENTATIONS` in turns: all in CUDA graphs, then the engines' call and upstream's form eagerly too.

    Args:
        calls: each implementation's calls on different memory.
        device: where they run.
        seconds: approximate time to measure each row.
    """
    timings = time_in_turns(calls, device, seconds=seconds)
    eager = time_eagerly({name: calls[name] for name in (ENGINES_CALL, UPSTREAM)}, device, seconds=seconds)
    return timings | {name + EAGER: timing for name, timing in eager.items()}


def baseline_of(implementation: str) -> str:
    """The row of upstream's form that a row is compared with: eager with eager, GPU time with GPU time."""
    return UPSTREAM + EAGER * implementation.endswith(EAGER)


EAGER_AT_LEAST = {
    (8, 64): {1536: 0.85, 16384: 2.0, 131072: 5.0},
    (8, 128): {1536: 0.85, 131072: 2.5},
    (1, 64): {1536: 0.85},
}
"""Least eager time of upstream's form over that of the call, by heads × head_dim and tokens."""
GPU_AT_LEAST = {(8, 64): {16384: 4.0, 131072: 4.0}}
"""The same for GPU times; 1 for all other shapes."""
WITHIN, MORE_US, FROM_US = 1.1, 2.0, 15.0
"""Largest GPU time of the call: `WITHIN` times the planned gather's, or `MORE_US` more if that is below `FROM_US`."""


def summary(rows: Sequence[Row]) -> str:
    """The engines' call next to upstream's form, with the targets; empty without such rows."""
    times = {(row.case, row.implementation): row.p50_us for row in rows}
    lines = []
    for case in CALLS:
        names = ("kvgather", ENGINES_CALL, UPSTREAM, ENGINES_CALL + EAGER, UPSTREAM + EAGER)
        if all((case.name, name) in times for name in names):
            planned, call, upstream, eager, eager_upstream = (times[case.name, name] for name in names)
            shape, tokens = (case.num_heads, case.k_dim), case.total_tokens
            most = WITHIN * planned if planned >= FROM_US else planned + MORE_US
            verdicts = [
                _verdict("eager", eager_upstream / eager, EAGER_AT_LEAST[shape].get(tokens)),
                _verdict("GPU", upstream / call, GPU_AT_LEAST.get(shape, {}).get(tokens, 1.0)),
                f"GPU {call:.1f} µs, planned {planned:.1f} (≤ {most:.1f}): {_reached(call <= most)}",
            ]
            lines.append(f"{case.name}\n  " + "\n  ".join(verdicts))
    return "\n".join(["cp_mha_gather_cache against upstream's form", *lines]) if lines else ""


def _verdict(name: str, ratio: float, least: float | None) -> str:
    return f"{name} {ratio:.2f} ×" + (f" (≥ {least:g} ×): {_reached(ratio >= least)}" if least is not None else "")


def _reached(reached: bool) -> str:
    return "reached" if reached else "NOT reached"
