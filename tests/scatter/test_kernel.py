"""The write's kernel on its own: what a CPU's checks keep from it, and a GPU's do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvgather as kg
from kvgather.lab.trace import trace
from tests.where import interpreted

LAYOUTS = ("NHD", "HND", "SHUFFLE")


def written(cache: kg.PagedKVCache, slots: list[int], dtype: torch.dtype = torch.int64) -> tuple[Any, int]:
    """Launch the kernel with these slots under the trace; the report, and the largest slot that was refused."""
    from kvgather.scatter.kernel import ScatterLaunch

    g = cache.geometry
    k = torch.ones(len(slots), g.num_kv_heads, g.head_dim)
    v = torch.ones(len(slots), g.num_kv_heads, g.v_head_dim)
    at, too_large = torch.tensor(slots, dtype=dtype), torch.tensor([-1])
    launch = ScatterLaunch(cache.key_cache, cache.value_cache, g, cache.scales, k, v, at, too_large)
    with trace(strict=True) as report:
        launch(k, v, at)
    return report, int(too_large)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
@pytest.mark.parametrize("past", [0, 1, 5, 2**40])
def test_slots_past_the_pool_are_skipped_and_kept(layout: str, kind: str, past: int) -> None:
    """The first slot past the pool is the one that `>` for `>=` would write."""
    cache = kg.PagedKVCache(3, 16, 2, 16, layout=layout, scale=kind, device="cpu")
    last = cache.num_slots - 1
    report, refused = written(cache, [last, cache.num_slots + past, -1, 0])
    assert not report.violations, report
    assert refused == cache.num_slots + past
    for slot in (last, 0):
        plan = kg.GatherPlan.build(
            torch.tensor([[slot // 16]]), torch.tensor([0, 1]), page_size=16, num_blocks=3,
            seq_starts=torch.tensor([slot % 16]),
        )  # fmt: skip
        assert all(bool((rows.float() - 1).abs().max() < 0.1) for rows in cache.gather(plan))


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_writes_nothing(dtype: torch.dtype) -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, device="cpu")
    report, refused = written(cache, [-1, -(2**31), -7], dtype)
    assert not report.violations and refused == -1
    assert not cache.key_cache.view(torch.uint8).any() and not cache.value_cache.view(torch.uint8).any()
