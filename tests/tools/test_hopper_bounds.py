"""The rows of `tools/hopper_bounds.py` that are committed: the rule takes the Hopper kernel where it was faster."""

from __future__ import annotations

import csv
from pathlib import Path

import hopper_bounds
from hopper_bounds import KV_HEADS, TOLERANCE, Shape

from kvgather.hopper.plan import wins

H100 = 132  # processors
ROWS = Path(__file__).parents[2] / "benchmarks/results/hopper_bounds_h100.csv"
MOST_LOST = 1.2
"""Where the rule leaves a faster Hopper kernel aside: it knows few numbers, and decides between measured shapes."""


def committed() -> dict[Shape, dict[str, str]]:
    with ROWS.open(newline="") as file:
        return {Shape(*(int(row[name]) for name in Shape._fields)): row for row in csv.DictReader(file)}


def test_every_shape_was_measured_on_a_named_device() -> None:
    rows = committed()
    assert list(rows) == hopper_bounds.shapes()
    for row in rows.values():
        assert tuple(row) == hopper_bounds.COLUMNS and all(row.values()) and len(row["date"]) == 10
        assert 0 < float(row["error"]) <= TOLERANCE


def test_the_rule_takes_the_kernel_that_was_faster() -> None:
    taken = []
    for shape, row in committed().items():
        ratio = float(row["direct_us"]) / float(row["hopper_us"])
        new = (shape.new,) * shape.sequences
        if wins(new, shape.cached + shape.new, shape.dim, shape.group, KV_HEADS, H100):
            assert ratio > 1, shape
            taken.append(ratio)
        else:
            assert ratio < MOST_LOST, shape
    assert len(taken) >= 20 and max(taken) > 1.4
