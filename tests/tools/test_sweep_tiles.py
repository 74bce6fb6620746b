"""The rows of `tools/sweep_tiles.py` that are committed, and the cases that it measures."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from kvgather.device import triton_available

pytestmark = pytest.mark.triton
if triton_available():
    import sweep_tiles

    from kvgather.attention.direct import Tile

H100 = 132  # processors
ROWS = Path(__file__).parents[2] / "benchmarks/results/tiles_h100.csv"
TOO_FEW_SPLITS = "64q8x64-NHD-1seqs-131072+1"
"""The sweep went to 64 splits; the tile that is chosen has 128."""


def committed() -> dict[str, list[dict[str, str]]]:
    """The rows of each case."""
    with ROWS.open(newline="") as file:
        by_case: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in csv.DictReader(file):
            by_case[row["case"]].append(row)
    return by_case


def tile_of(row: dict[str, str]) -> Tile:
    sizes = (int(row[name]) for name in ("m", "n", "num_warps", "num_stages", "splits"))
    return Tile(*sizes, int(row["registers"]) if row["registers"] else None)


def test_every_case_was_measured_on_a_named_device() -> None:
    by_case = committed()
    assert set(by_case) == {shape.name for shape in sweep_tiles.shapes()}
    for rows in by_case.values():
        times = [float(row["p50_us"]) for row in rows]
        assert times == sorted(times) and times[0] > 0
        assert all(row["device"] and row["torch"] and row["triton"] and row["commit"] for row in rows)
        assert {len(row["date"]) for row in rows} == {10}


def test_the_tile_that_is_chosen_is_within_5_percent_of_the_fastest() -> None:
    by_case = committed()
    for shape in sweep_tiles.shapes():
        rows, chosen = by_case[shape.name], sweep_tiles.tiles(shape, H100)[0]
        marked = [row for row in rows if row["chosen"] == "True"]
        assert [tile_of(row) for row in marked] == ([] if shape.name == TOO_FEW_SPLITS else [chosen]), shape.name
        for row in marked:
            assert float(row["p50_us"]) <= 1.05 * float(rows[0]["p50_us"]), shape.name
