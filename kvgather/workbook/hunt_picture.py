"""Which tool finds which bug of the hunt, as a table of dots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from kvgather.workbook.figures import EMPTY, GOOD, INK, LINE, figure

__all__ = ["hunt_picture"]


def hunt_picture(said: Mapping[str, Mapping[str, str]]) -> Figure:
    """A row for each bug, a column for each tool: a filled dot where the tool speaks, an empty one where it is silent.

    Args:
        said: for each bug, what each tool says, "" if nothing.
    """
    tools = list(next(iter(said.values())))
    drawing, axes = figure(1.8 + 0.95 * len(tools), 1.1 + 0.36 * len(said))
    for row, answers in enumerate(said.values()):
        axes.axhline(row, color=EMPTY, linewidth=1.0, zorder=0)
        for column, tool in enumerate(tools):
            speaks = bool(answers[tool])
            style: Any = {"facecolor": GOOD if speaks else "none", "edgecolor": INK if speaks else LINE}
            axes.scatter(column, row, s=150 if speaks else 60, zorder=2, **style)
    counts = [sum(bool(answers[tool]) for answers in said.values()) for tool in tools]
    axes.set_xticks(range(len(tools)), [f"{t}\n{n} of {len(said)}" for t, n in zip(tools, counts, strict=True)])
    axes.set_yticks(range(len(said)), [f"{number}  {name}" for number, name in enumerate(said, start=1)])
    axes.set(xlim=(-0.6, len(tools) - 0.4), ylim=(len(said) - 0.4, -0.6))
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return drawing
