"""What was measured as `auto` is the path that the rule takes now: chapter 08b draws one and prints the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kvgather.attention.choose import LAUNCH, MEASURED_ON, READ, SPEEDS, choose
from kvgather.workbook.checks.ch08b import EXPECTED, MOST
from kvgather.workbook.measured_paths import (
    FILE,
    PATHS,
    MeasuredPaths,
    expected_of_case,
    facts_of_case,
    measured_paths,
    rule_takes,
    switch_of,
)
from kvgather.workbook.measured_peers import PRODUCT_SPEED, least_time

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


def test_expected_times_are_those_of_the_reasons() -> None:
    for measured in WITH_AUTO:
        if measured.case.window is None:
            path, times = rule_takes(measured.case), expected_of_case(measured.case)
            assert path == min(times, key=times.__getitem__)
            assert f"about {times[path]:,.0f} µs expected" in choose(facts_of_case(measured.case)).why


def test_equal_new_tokens_have_another_best_path_with_other_kv_heads() -> None:
    """The batches of exercise 08b.3 without recorded rows: recorded ones of as many rows and equal head dim agree."""
    recorded = {measured.case.rows: measured.times for measured in shapes()[16, 2, 256]}
    for case, best in zip(EXPECTED, ("hybrid", "direct"), strict=True):
        other = {"hybrid": "direct", "direct": "hybrid"}[best]
        for times in (expected_of_case(case), recorded[case.rows]):
            assert best == min(PATHS, key=times.__getitem__) and times[other] > MOST * times[best]


def test_a_rule_by_new_tokens_alone_is_refused_only_by_batches_without_rows() -> None:
    worst = max(
        measured.times["direct" if measured.case.new[0] <= 64 else "hybrid"] / measured.best
        for measured in measured_paths("reach", "auto")
    )
    assert worst < MOST


def test_the_crossings_are_those_of_the_hint() -> None:
    crossings = []
    for points in shapes().values():
        lead = {at.case.rows: at.times["direct"] - at.times["hybrid"] for at in points}
        below, above = max(r for r in lead if lead[r] < 0), min(r for r in lead if lead[r] > 0)
        crossings.append(below - lead[below] * (above - below) / (lead[above] - lead[below]))
    assert crossings == pytest.approx([700, 400, 220], rel=0.03)
    assert "cross at about 700, 400 and 220 rows" in _text()


def test_the_sentences_about_the_lines_are_true() -> None:
    points = {at.case.new[0]: at for at in shapes()[64, 8, 64]}
    gather = [points[new].times["gather"] for new in (8, 16, 32, 64, 128)]
    assert max(gather) < 1.03 * min(gather)
    assert min(points[256].times["gather"] / max(gather), min(gather) / points[1].times["gather"]) > 1.5
    hybrid, alone = (points[1].times[name] for name in ("hybrid", "dense, no gather, cached part"))
    copy = points[1].times["gather"] - points[1].times["dense, no gather"]
    assert 0.9 * hybrid < copy + alone < hybrid  # the gather, and reading its copy once
    case, speed = points[16].case, SPEEDS[64].direct
    assert case.rows == 128  # one tile
    products = expected_of_case(case)["direct"] - LAUNCH["direct"]
    assert products > case.read_bytes / READ and least_time(case).limit == "bytes"
    assert f"({speed:g} TFLOP/s, below)" in _text() and f"sheet's {PRODUCT_SPEED / 1e6:g} TFLOP/s" in _text()


def test_the_bounded_run_is_what_the_chapter_says() -> None:
    (at,) = measured_paths("workspace")
    bounded = f"gather, workspace {at.case.workspace}"
    assert at.best == at.times["direct"] and rule_takes(at.case) == "direct"
    assert 1 < at.times[bounded] / at.times["hybrid"] < 1.1
    assert at.peaks[bounded] / at.peaks["hybrid"] == pytest.approx(1 / 8, rel=0.02)
    said = f"One sequence with {at.case.cached[0]:,} cached and {at.case.new[0]} new tokens"
    assert said in _text() and f"pieces of {at.case.workspace:,} tokens" in _text()


def _text() -> str:
    """The text of the chapter, without line breaks."""
    cells = nbformat.read(CHAPTER, as_version=4).cells
    return " ".join(" ".join(cell.source.split()) for cell in cells if cell.cell_type == "markdown")


def _alts(notebook: Any) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
