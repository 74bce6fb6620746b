"""Text tables for people: aligned by tabulate, plain rows without it."""

from __future__ import annotations

from collections.abc import Sequence

try:
    from tabulate import tabulate
except ImportError:  # it comes with kvgather[bench]
    tabulate = None


def text_table(rows: Sequence[Sequence[str]], headers: Sequence[str], align: str) -> str:
    """A table with a line of headers.

    Args:
        rows: rows of cells.
        headers: one for each column.
        align: one letter for each column, "l" or "r".
    """
    if tabulate is None:
        return "\n".join("  ".join(cells).strip() for cells in (headers, *rows))
    sides = ["left" if letter == "l" else "right" for letter in align]
    text: str = tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=sides if rows else None)
    return text
