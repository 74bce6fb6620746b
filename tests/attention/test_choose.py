"""The rule behind `path="auto"`, and what it says about itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvgather.attention.choose import MEASURED_ON, MOST_ROWS, PATHS, Facts, choose, explained

H100 = Facts(
    new=16,
    keys=8208,
    group=8,
    head_dim=64,
    v_head_dim=64,
    dtype=torch.bfloat16,
    device="cuda",
    triton=True,
    window=None,
)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256])
def test_short_suffixes_go_straight_to_the_pages_and_long_ones_do_not(dim: int, window: int | None) -> None:
    facts = replace(H100, head_dim=dim, window=window)
    assert choose(replace(facts, new=1)).path == "direct"
    assert choose(replace(facts, new=8192)).path == "gather"
    paths = [choose(replace(facts, new=2**n)).path for n in range(14)]
    assert paths == sorted(paths), "direct, and from some length on gather"


def test_the_larger_dim_decides_and_the_table_ends() -> None:
    both = [replace(H100, head_dim=k, v_head_dim=v) for k, v in ((192, 128), (128, 192))]
    assert choose(both[0]) == choose(both[1])
    assert choose(replace(H100, new=1, head_dim=512)).path == "gather"
    assert [*MOST_ROWS] == sorted(MOST_ROWS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "cpu"}, "on a cpu"),
        ({"triton": False}, "Triton is not available"),
        ({"dtype": torch.float32}, "q is float32"),
        ({"new": 8192}, "8192 new × 8 = 65536 rows >"),
    ],
)
def test_when_it_gathers_it_says_why(change: dict[str, Any], why: str) -> None:
    facts = replace(H100, **change)
    assert choose(facts).path == "gather" and why in choose(facts).why
    assert f"auto takes the gather path: {choose(facts).why}" in explained(facts)


def test_the_explanation_has_every_number_and_its_source() -> None:
    told = explained(replace(H100, v_head_dim=48, window=128))
    most = MOST_ROWS[64]["a window"]
    for part in ("the direct path: 16 new × 8 = 128 rows", "8208 tokens", "window 128", "8 query heads to a KV head",
                 "dims 64 and 48", "bfloat16, cuda", f"direct up to {most} rows", MEASURED_ON):  # fmt: skip
        assert part in told, part
    assert choose(H100).path in PATHS
