"""What was measured as `auto` is the path that the rule takes now: chapter 08b draws one and prints the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kvgather.attention.choose import MEASURED_ON, choose
from kvgather.workbook.measured_paths import (
    FILE,
    PATHS,
    MeasuredPaths,
    facts_of_case,
    measured_paths,
    rule_takes,
    switch_of,
)

CHAPTER = Path(__file__).parents[2] / "notebooks" / "08b_bounded_and_direct.ipynb"
WITH_AUTO = [measured for measured in measured_paths() if "auto" in measured.times]


def shapes() -> dict[tuple[int, int, int], list[MeasuredPaths]]:
    """The batches that the chapter draws: 16 sequences with 8,192 cached tokens, by the heads of the layer."""
    found: dict[tuple[int, int, int], list[MeasuredPaths]] = {}
    for measured in measured_paths("reach", "auto"):
        if (case := measured.case).cached == (8192,) * 16:
            found.setdefault((case.q_heads, case.kv_heads, case.head_dim), []).append(measured)
    return found


def test_the_rows_are_those_that_the_rule_was_fitted_to() -> None:
    assert MEASURED_ON.endswith(f"benchmarks/results/{FILE}")
    assert len(WITH_AUTO) >= 50 and len(shapes()) == 3


@pytest.mark.parametrize("measured", WITH_AUTO, ids=lambda measured: measured.case.name)
def test_auto_was_measured_with_the_rule_that_ships(measured: MeasuredPaths) -> None:
    """Within 5 % of the path that the rule takes; a file with an older rule's choices is 10 % off and more."""
    path = rule_takes(measured.case)
    assert measured.times["auto"] == pytest.approx(measured.times[path], rel=0.05), path


def test_an_older_rule_would_be_noticed() -> None:
    """On every batch that the chapter draws, the other path differs by more than 5 %."""
    for points in shapes().values():
        for measured in points:
            other = "hybrid" if rule_takes(measured.case) == "direct" else "direct"
            assert abs(measured.times["auto"] / measured.times[other] - 1) > 0.05, measured.case.name


def test_the_switch_is_where_the_rule_changes_its_mind() -> None:
    for points in shapes().values():
        switch = switch_of(points[0].case)
        for measured in points:
            assert (rule_takes(measured.case) == "direct") == (measured.case.new[0] < switch), measured.case.name
        case = replace(points[0].case, new=(switch,) * 16)
        assert choose(facts_of_case(case)).path in PATHS[1:]
        assert rule_takes(replace(case, new=(switch - 1,) * 16)) == "direct"


def test_a_rule_that_never_switches_is_named() -> None:
    case = shapes()[64, 8, 64][0].case
    with pytest.raises(ValueError, match="accepted: a case in which auto leaves"):
        switch_of(replace(case, window=1))


def test_the_committed_chapter_draws_the_switches_of_the_rule() -> None:
    alts = [text for text in _alts(nbformat.read(CHAPTER, as_version=4)) if "auto leaves the direct path" in text]
    switches = ", ".join(str(switch_of(points[0].case)) for points in shapes().values())
    assert len(alts) == 1 and alts[0].endswith(f"at {switches} new tokens.")


def _alts(notebook: Any) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
