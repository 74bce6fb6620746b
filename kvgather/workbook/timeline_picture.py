"""The timeline of an engine: what each step computed, what it found in the cache, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..serving.counters import Step
from .figures import EMPTY, GOOD, LINE, PALETTE, figure

__all__ = ["timeline_picture"]


def timeline_picture(steps: Sequence[Step]) -> Figure:
    """Two rows above one axis of time: tokens of each step, and its requests. A bar is as wide as its step was long.

    Args:
        steps: of one run, at least one.
    """
    drawing, (tokens, requests) = figure(9.5, 4.2, rows=2, sharex=True, height_ratios=[3, 2])
    start = steps[0].begin
    at = [1000 * (step.begin - start) for step in steps]
    style: dict[str, Any] = {
        "width": [1000 * step.seconds for step in steps], "align": "edge", "edgecolor": LINE, "linewidth": 0.6,
    }  # fmt: skip
    prefill, cached = [s.prefill_tokens for s in steps], [s.cached_tokens for s in steps]
    decodes, prefills = [s.decodes for s in steps], [s.prefills for s in steps]
    tokens.bar(at, prefill, color=PALETTE[4], label="prompt tokens computed", **style)
    tokens.bar(at, decodes, bottom=prefill, color=PALETTE[5], label="decoded tokens", **style)
    computed = [a + b for a, b in zip(prefill, decodes, strict=True)]
    tokens.bar(at, cached, bottom=computed, color=GOOD, label="prompt tokens already in the cache", **style)
    tokens.set(ylabel="tokens")
    tokens.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, facecolor=EMPTY)
    requests.bar(at, prefills, color=PALETTE[4], **style)
    requests.bar(at, decodes, bottom=prefills, color=PALETTE[5], **style)
    requests.set(ylabel="requests", xlabel="ms since the first step")
    return drawing
