"""A picture of many outcomes: a colored and labelled cell for each case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .figures import BAD, EMPTY, GOOD, PALETTE, figure, text_color

__all__ = ["outcome_picture"]

COLORS = {"exact": GOOD, "wrong values": PALETTE[6], "outside": BAD, "refused": EMPTY}


def outcome_picture(
    outcomes: Mapping[tuple[str, str, str], str],
    groups: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """One panel for each group, with a cell for each (group, row, column).

    Args:
        outcomes: a key of `COLORS` for each (group, row, column).
        groups: titles of the panels, left to right.
        rows, columns: labels of the cells.
        title: text above the picture.

    Raises:
        ValueError: an outcome is not a key of `COLORS`.
    """
    unknown = sorted(set(outcomes.values()) - set(COLORS))
    if unknown:
        raise ValueError(f"outcomes has {unknown[0]!r}; accepted: {', '.join(COLORS)}")
    drawing, panels = figure(10.5, 0.8 + 0.36 * len(rows), columns=len(groups), squeeze=False)
    for group, axes in zip(groups, panels[0], strict=True):
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                word = outcomes[group, row, column]
                color = COLORS[word]
                style: Any = {"edgecolor": "white", "linewidth": 1.5, "hatch": "//" if word == "outside" else None}
                axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, **style))
                box = {"facecolor": color, "edgecolor": "none", "pad": 1.2}
                axes.text(x + 0.5, y + 0.5, word.replace("wrong values", "wrong"), ha="center", va="center",
                          fontsize=8, color=text_color(color), bbox=box)  # fmt: skip
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, fontsize=8)
        labels = rows if group == groups[0] else [""] * len(rows)
        axes.set_yticks([y + 0.5 for y in range(len(rows))], labels, fontsize=8.5)
        axes.tick_params(length=0)
        axes.set_title(group, fontsize=10)
        for spine in axes.spines.values():
            spine.set_visible(False)
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return drawing
