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
STYLES = {
    "left": "text-align:left;white-space:nowrap",
    "right": "text-align:right;white-space:nowrap",
    "wrapped": "text-align:left;white-space:normal;min-width:18em",
}
WRAPPED_TEXT = 60  # columns of a wrapped cell in plain text


@dataclass(frozen=True)
class Link:
    """A cell that links to a file next to the notebook, or to an address."""

    text: str
    target: str

    def __str__(self) -> str:
        return self.text


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str], *, wrapped: Sequence[str] = ()) -> None:
    """Display a table that does not wrap: HTML, with the same table as plain text.

    Args:
        rows: rows of cells; floats are printed with four significant digits, None as a dash, a `Link` as a link.
        headers: one for each column; columns of numbers are aligned to the right, all others to the left.
        wrapped: headers of the columns whose cells are sentences and may wrap.

    Raises:
        ValueError: a row has more or fewer cells than `headers`, or no header is called as one of `wrapped`.
    """
    rows = [tuple(row) for row in rows]
    forms = {
        "text/html": table_html(rows, headers, wrapped=wrapped),
        "text/plain": table_text(rows, headers, wrapped=wrapped),
    }
    display(forms, raw=True)


def table_text(rows: Iterable[Sequence[Any]], headers: Sequence[str], *, wrapped: Sequence[str] = ()) -> str:
    """The table as plain text, the text/plain form of `table`; arguments and errors are those of `table`."""
    cells, sides = _cells(rows, headers, wrapped)
    if not cells:
        return tabulate([], headers, tablefmt="simple")
    aligned = ["right" if side == "right" else "left" for side in sides]
    widths = [WRAPPED_TEXT if side == "wrapped" else None for side in sides] if wrapped else None
    return tabulate(cells, headers, tablefmt="simple", disable_numparse=True, colalign=aligned, maxcolwidths=widths)


def table_html(rows: Iterable[Sequence[Any]], headers: Sequence[str], *, wrapped: Sequence[str] = ()) -> str:
    """The table as HTML, the text/html form of `table`; arguments and errors are those of `table`.

    Each cell has a line of its own, so that nbval's sanitizing, which works on lines, does not reach the next cell.
    """
    rows = [tuple(row) for row in rows]
    cells, sides = _cells(rows, headers, wrapped)
    lines = [OPENING, "<table>", "<thead>", "<tr>"]
    lines += [f'<th style="{STYLES[side]}">{html.escape(name)}</th>' for name, side in zip(headers, sides, strict=True)]
    lines += ["</tr>", "</thead>", "<tbody>"]
    for row, texts in zip(rows, cells, strict=True):
        lines.append("<tr>")
        for value, text, side in zip(row, texts, sides, strict=True):
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


def _cells(
    rows: Iterable[Sequence[Any]], headers: Sequence[str], wrapped: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """The cells as texts, and the style of each column."""
    if unknown := [name for name in wrapped if name not in headers]:
        raise ValueError(f"wrapped has {unknown[0]!r}; accepted: {', '.join(map(repr, headers))}")
    cells = [[_text(value) for value in row] for row in rows]
    for place, row in enumerate(cells):
        if len(row) != len(headers):
            raise ValueError(f"rows[{place}] has {len(row)} cells; accepted: {len(headers)}, one for each header")
    columns = [[row[place] for row in cells] for place in range(len(headers))]
    sides = ["right" if column and all(map(_is_number, column)) else "left" for column in columns]
    return cells, ["wrapped" if name in wrapped else side for name, side in zip(headers, sides, strict=True)]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix("%").replace(",", "").replace("–", "0"))
    except ValueError:
        return False
    return True
