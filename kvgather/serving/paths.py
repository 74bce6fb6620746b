"""Which path `auto` takes in an engine's steps, and what the other paths would cost by the same rule."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.batch import PrefixBatch
from ..attention.choose import SPEEDS, choose, expected_times, facts_of
from ..cache import PagedKVCache


class PathLog:
    """Counts paths by the kind of layer: "full", or "window 128".

    The times are those of `kvgather.attention.choose`, in µs per layer, which are expected and not measured; there are
    none on a CPU, where the gather path is the only fast one.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, dict[str, Any]] = {}

    def note(
        self, batch: PrefixBatch, pool: PagedKVCache, q_heads: int, dtype: torch.dtype, window: int | None
    ) -> None:
        """Count the path that `auto` takes for the layers of a kind in one step."""
        facts = facts_of(batch, pool, q_heads, dtype, window)
        taken = choose(facts).path
        log = self._kinds.setdefault(f"window {window}" if window else "full", {"steps": {}, "expected_us": {}})
        log["steps"][taken] = log["steps"].get(taken, 0) + 1
        larger = max(facts.head_dim, facts.v_head_dim)
        speeds = next((speeds for dim, speeds in SPEEDS.items() if larger <= dim), None)
        if facts.device != "cuda" or not facts.triton or speeds is None:
            return
        times = expected_times(facts, speeds)
        times.setdefault("hybrid", times["direct"])  # without a common part the hybrid path reads all pages directly
        for name, time in (times | {"auto": times[taken]}).items():
            log["expected_us"][name] = round(log["expected_us"].get(name, 0.0) + time, 1)

    def as_json(self) -> dict[str, Any]:
        """By kind of layer: `steps`, how often each path was taken; `expected_us`, each path's time if it had been.

        A copy: another thread may note paths meanwhile.
        """
        return {kind: {name: dict(by_path) for name, by_path in log.items()} for kind, log in list(self._kinds.items())}
