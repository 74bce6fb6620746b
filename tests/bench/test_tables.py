"""Text tables, with tabulate and without."""

from __future__ import annotations

import pytest

from kvgather.bench import tables
from kvgather.bench.tables import text_table

ROWS = [("direct", "9.5 µs", ""), ("gather, workspace 64", "120.0 µs", "NOT reached")]
HEADERS = ("", "median", "")


@pytest.mark.skipif(tables.tabulate is None, reason="needs tabulate")
def test_columns_are_aligned() -> None:
    assert text_table(ROWS, HEADERS, "lrl").splitlines() == [
        "                        median",
        "direct                  9.5 µs",
        "gather, workspace 64  120.0 µs  NOT reached",
    ]
    assert text_table([], HEADERS, "lrl").split() == ["median"]


def test_without_tabulate_the_cells_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "tabulate", None)
    assert text_table(ROWS, HEADERS, "lrl").splitlines() == [
        "median",
        "direct  9.5 µs",
        "gather, workspace 64  120.0 µs  NOT reached",
    ]
