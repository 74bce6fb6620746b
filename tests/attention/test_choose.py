"""The rule behind `path="auto"`, and what it says about itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvgather.attention.choose import MEASURED_ON, SPEEDS, Facts, choose, expected_times, explained
from kvgather.bench.report import read
from kvgather.cases.prefix import cases

H100 = Facts(
    lengths=((16, 8208),) * 16,
    common=8192,
    kv_heads=8,
    group=8,
    head_dim=64,
    v_head_dim=64,
    itemsize=1,
    dtype=torch.bfloat16,
    device="cuda",
    triton=True,
    window=None,
)


def of(new: int, cached: int = 8192, sequences: int = 16, **changes: Any) -> Facts:
    lengths = ((new, cached + new),) * sequences
    return replace(H100, lengths=lengths, common=cached // 1024 * 1024, **changes)


def test_a_share_of_the_pages_is_never_gathered_on_a_gpu() -> None:
    """Its keys are not next to each other: the gather path takes a call for each page with new tokens."""
    for new in (1, 16, 512, 4096):
        for change in ({}, {"dtype": torch.float32}, {"head_dim": 512}, {"window": 128, "common": 0}):
            facts = replace(of(new), shared=True, **change)
            assert choose(facts).path in (("direct", "hybrid") if not change else ("direct",)), facts
            assert explained(facts)
    assert {choose(replace(of(new), shared=True)).path for new in (1, 512)} == {"direct", "hybrid"}
    assert choose(replace(of(512), shared=True, device="cpu")).path == "gather"


@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256])
def test_short_suffixes_go_straight_to_the_pages_and_long_ones_do_not(dim: int) -> None:
    facts = [of(2**n, head_dim=dim, v_head_dim=dim) for n in range(14)]
    paths = [choose(fact).path for fact in facts]
    assert paths[0] == "direct" and "hybrid" in paths
    order = ["direct", "hybrid", "gather"]
    assert paths == sorted(paths, key=order.index), "the longer the suffix, the more is gathered"


def test_one_sequence_keeps_a_dense_kernel_less_busy_than_sixteen() -> None:
    assert choose(of(128)).path == "hybrid"
    assert choose(of(64, 32768, 1, kv_heads=2)).path == "direct"


def test_few_long_suffixes_among_many_short_ones_do_not_decide() -> None:
    mixed = replace(of(1), lengths=((1, 8193),) * 15 + ((512, 512),), common=0)
    assert choose(mixed).path == "direct"


def test_the_larger_dim_decides_and_the_table_ends() -> None:
    both = [replace(H100, head_dim=k, v_head_dim=v) for k, v in ((192, 128), (128, 192))]
    assert [choose(facts).path for facts in both] == [choose(both[0]).path] * 2
    assert choose(of(1, head_dim=512)).path == "gather"
    assert [*SPEEDS] == sorted(SPEEDS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "cpu"}, "on a cpu"),
        ({"triton": False}, "Triton is not available"),
        ({"dtype": torch.float32}, "q is float32"),
        ({"head_dim": 512}, "head dim 512 is above the largest measured one, 256"),
        ({"lengths": ((8192, 8192),) * 16, "common": 0, "head_dim": 128, "v_head_dim": 128}, "µs expected"),
    ],
)
def test_when_it_gathers_it_says_why(change: dict[str, Any], why: str) -> None:
    facts = replace(H100, **change)
    assert choose(facts).path == "gather" and why in choose(facts).why
    assert f"auto takes the gather path: {choose(facts).why}" in explained(facts)


def test_without_a_common_part_there_is_no_hybrid_path() -> None:
    facts = of(512)
    assert [*expected_times(facts, SPEEDS[64])] == ["direct", "gather", "hybrid"]
    assert [*expected_times(replace(facts, common=0), SPEEDS[64])] == ["direct", "gather"]
    assert "µs of the hybrid path" in choose(of(1)).why and "hybrid" not in choose(replace(of(1), common=0)).why


@pytest.mark.parametrize("lengths", [(), ((0, 0),), ((0, 4096), (0, 1)), ((1, 1),)])
@pytest.mark.parametrize("window", [None, 1, 128])
def test_nothing_to_attend_to_has_a_path_too(lengths: tuple[tuple[int, int], ...], window: int | None) -> None:
    assert choose(replace(H100, lengths=lengths, common=0, window=window)).path in ("direct", "gather")


@pytest.mark.parametrize(
    ("dim", "new", "path"),
    [(64, 16, "direct"), (64, 128, "direct"), (64, 512, "hybrid"), (128, 32, "direct"), (128, 128, "direct")],
)
def test_the_hopper_kernel_makes_the_direct_path_faster(dim: int, new: int, path: str) -> None:
    """Measured on one H100, see `hopper.plan`: 779 µs for 786 of the hybrid path, 2,833 for 2,670, 573 for 780."""
    facts = of(new, head_dim=dim, v_head_dim=dim, group=512 // dim, hopper=True)
    assert choose(facts).path == path
    slower, faster = (expected_times(fact, SPEEDS[dim]) for fact in (replace(facts, hopper=False), facts))
    assert faster["direct"] < slower["direct"] and faster["hybrid"] == slower["hybrid"]
    assert f"direct on Hopper {SPEEDS[dim].hopper:g}, dense" in explained(facts)


def test_the_explanation_has_the_numbers_and_their_source() -> None:
    told = explained(replace(H100, v_head_dim=48, window=128, common=0))
    for part in ("the direct path: about", "µs of the gather path", "16 sequences, at most 16 new tokens",
                 "8,208 tokens; 8,192 cached in each", "window 128", "8 query heads to each of 8 KV heads",
                 "dims 64 and 48", "bfloat16, cuda",
                 f"direct {SPEEDS[64].direct:g}", MEASURED_ON):  # fmt: skip
        assert part in told, part


def test_the_rule_takes_the_path_that_was_measured_to_be_faster() -> None:
    """On the committed rows: within 5 % of the fastest path on 27 of 30 shapes, within 10 % on all."""
    rows = read(Path(__file__).parents[2] / "benchmarks/results/prefix_h100.csv")
    times = {(row.case, row.implementation): row.p50_us for row in rows}
    ratios = []
    for case in (case for case in cases(torch.device("cuda")) if case.part == "auto"):
        facts = of(case.new[0], case.cached[0], len(case.new), kv_heads=case.kv_heads, head_dim=case.head_dim,
                   v_head_dim=case.head_dim, group=case.q_heads // case.kv_heads)  # fmt: skip
        better = min(times[case.name, path] for path in ("direct", "gather", "hybrid"))
        ratios.append(times[case.name, choose(facts).path] / better)
    assert len(ratios) == 30
    assert sum(ratio <= 1.05 for ratio in ratios) >= 27 and max(ratios) <= 1.10
