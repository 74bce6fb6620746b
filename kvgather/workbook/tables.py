"""House style of the workbook's tables: HTML for the reader, aligned plain text for terminals and diffs."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from IPython.display import display
from tabulate import tabulate

__all__ = ["Link", "is_house_table", "table", "table_html", "table_text"]

# JupyterLab keeps only these inline styles of an output that it does not trust, such as one of a fresh copy. The table
# sets no color: it inherits the colors of a light theme, of a dark theme and of the book. Each cell forbids wrapping,
# because JupyterLab sets white-space for each cell; the frame scrolls instead of the page.
OPENING = '<div class="kvgather-table" style="overflow:auto">'
CLOSING = "</table>\n</div>"
STYLES = {"left": "text-align:left;white-space:nowrap", "right": "text-align:right;white-space:nowrap"}


@dataclass(frozen=True)
class Link:
    """A cell that links to a file next to the notebook, or to an address."""

    text: str
    target: str

    def __str__(self) -> str:
        return self.text


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> None:
    """Display a table that does not wrap: HTML, with the same table as plain text.

    Args:
        rows: rows of cells; floats are printed with four significant digits, None as a dash, a `Link` as a link.
        headers: one for each column; columns of numbers are aligned to the right, all others to the left.

    Raises:
        ValueError: a row has more or fewer cells than `headers`.
    """
    rows = [tuple(row) for row in rows]
    display({"text/html": table_html(rows, headers), "text/plain": table_text(rows, headers)}, raw=True)


def table_text(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """The table as plain text, the text/plain form of `table`; arguments and errors are those of `table`."""
    cells, aligned = _cells(rows, headers)
    return tabulate(cells, headers, tablefmt="simple", disable_numparse=True, colalign=aligned if cells else None)


def table_html(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """The table as HTML, the text/html form of `table`; arguments and errors are those of `table`.

    Each cell has a line of its own, so that nbval's sanitizing, which works on lines, does not reach the next cell.
    """
    rows = [tuple(row) for row in rows]
    cells, aligned = _cells(rows, headers)
    lines = [OPENING, "<table>", "<thead>", "<tr>"]
    lines += [
        f'<th style="{STYLES[side]}">{html.escape(name)}</th>' for name, side in zip(headers, aligned, strict=True)
    ]
    lines += ["</tr>", "</thead>", "<tbody>"]
    for row, texts in zip(rows, cells, strict=True):
        lines.append("<tr>")
        for value, text, side in zip(row, texts, aligned, strict=True):
            content = html.escape(text)
            if isinstance(value, Link):
                content = f'<a href="{html.escape(value.target)}">{content}</a>'
            lines.append(f'<td style="{STYLES[side]}">{content}</td>')
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody>", CLOSING])


def is_house_table(text: str) -> bool:
    """Whether an HTML text is a table of `table_html`: its frame, its tags, and no other style."""
    tags = {tag.lower() for tag in re.findall(r"<\s*/?\s*([a-zA-Z][\w-]*)", text)}
    styles = set(re.findall(r'style="([^"]*)"', text.removeprefix(OPENING)))
    framed = text.startswith(OPENING) and text.endswith(CLOSING)
    return framed and tags <= {"div", "table", "thead", "tbody", "tr", "th", "td", "a"} and styles <= {*STYLES.values()}


def _cells(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The cells as texts, and the alignment of each column."""
    cells = [[_text(value) for value in row] for row in rows]
    for place, row in enumerate(cells):
        if len(row) != len(headers):
            raise ValueError(f"rows[{place}] has {len(row)} cells; accepted: {len(headers)}, one for each header")
    columns = [[row[place] for row in cells] for place in range(len(headers))]
    return cells, ["right" if column and all(map(_is_number, column)) else "left" for column in columns]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").replace("–", "0"))
    except ValueError:
        return False
    return True
