"""The call that engines make next to upstream's form of it (our rewrite): cases of `kvgather bench gather`.

Upstream's form is timed as an engine launches it, `kernel[grid](…)` and nothing else. Rows named `…, eager` are the
time per call of a host loop, the host's or the GPU's, whichever is longer; the others are GPU time in a CUDA graph.
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
"""Inputs of the smallest case, 0.6 MB each, that three times the L2 of an H100 or H200 (50 and 60 MB) takes."""
ENGINES_CALL, UPSTREAM, EAGER = "cp_mha_gather_cache", "upstream form", ", eager"
IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "kvgather": ours,
    ENGINES_CALL: engines_call,
    UPSTREAM: upstream_form,
}


def time_calls_of_engines(
    ways: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float
) -> dict[str, Timing]:
    """Time `IMPLEMENTATIONS` in turns: all in CUDA graphs, then the engines' call and upstream's form eagerly too.

    Args:
        ways: by name, an implementation's calls on different memory.
        device: where.
        seconds: about how long to measure each row.
    """
    timings = time_in_turns(ways, device, seconds=seconds)
    eager = time_eagerly({name: ways[name] for name in (ENGINES_CALL, UPSTREAM)}, device, seconds=seconds)
    return timings | {name + EAGER: timing for name, timing in eager.items()}


def baseline_of(implementation: str) -> str:
    """The row of upstream's form that a row is held against: eager against eager, GPU time against GPU time."""
    return UPSTREAM + EAGER * implementation.endswith(EAGER)


EAGER_AT_LEAST = {
    (8, 64): {1536: 0.85, 16384: 2.0, 131072: 5.0},
    (8, 128): {1536: 0.85, 131072: 2.5},
    (1, 64): {1536: 0.85},
}
"""Upstream's time over the call's, eager, by heads × head_dim and tokens."""
GPU_AT_LEAST = {(8, 64): {16384: 4.0, 131072: 4.0}}
"""The same of GPU times; never below 1 elsewhere."""
WITHIN, MORE_US, FROM_US = 1.1, 2.0, 15.0
"""The call's GPU time: within this ratio of the planned gather's where that takes `FROM_US`, else `MORE_US` more."""


def summary(rows: Sequence[Row]) -> str:
    """What was measured of the engines' call, and whether it is enough; empty where nothing was."""
    times = {(row.case, row.implementation): row.p50_us for row in rows}
    lines = []
    for case in CALLS:
        names = ("kvgather", ENGINES_CALL, UPSTREAM, ENGINES_CALL + EAGER, UPSTREAM + EAGER)
        if all((case.name, name) in times for name in names):
            planned, call, upstream, eager, eager_upstream = (times[case.name, name] for name in names)
            shape, tokens = (case.num_heads, case.k_dim), case.total_tokens
            most = WITHIN * planned if planned >= FROM_US else planned + MORE_US
            said = [
                _said("eager", eager_upstream / eager, EAGER_AT_LEAST[shape].get(tokens)),
                _said("GPU", upstream / call, GPU_AT_LEAST.get(shape, {}).get(tokens, 1.0)),
                f"GPU {call:.1f} µs, planned {planned:.1f} (≤ {most:.1f}): {_reached(call <= most)}",
            ]
            lines.append(f"{case.name}\n  " + "\n  ".join(said))
    return "\n".join(["cp_mha_gather_cache against upstream's form", *lines]) if lines else ""


def _said(what: str, ratio: float, least: float | None) -> str:
    return f"{what} {ratio:.2f} ×" + (f" (≥ {least:g} ×): {_reached(ratio >= least)}" if least is not None else "")


def _reached(enough: bool) -> str:
    return "reached" if enough else "NOT reached"
