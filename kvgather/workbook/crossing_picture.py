"""A picture of the times of both paths against the number of new tokens, and of the switch between them."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .figures import EMPTY, INK, PALETTE, figure

__all__ = ["crossing_picture"]

MARKS = (("o", PALETTE[0]), ("s", PALETTE[5]), ("^", PALETTE[2]), ("D", PALETTE[3]), ("v", PALETTE[1]))


def crossing_picture(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], switches: Mapping[str, float] | None = None
) -> Figure:
    """A panel for each case: time against new tokens, a line for each path, a dashed line at the switch of `auto`.

    Args:
        panels: by title and path, the time in µs by the number of new tokens.
        switches: by title, the smallest number of new tokens for which `auto` does not take the direct path.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    styles = dict(zip(names, MARKS, strict=False))
    drawing, grid = figure(10.5 if len(panels) > 1 else 8.0, 3.9, columns=len(panels), squeeze=False, sharey=True)
    for (title, lines), axes in zip(panels.items(), grid[0], strict=True):
        counts = sorted({new for line in lines.values() for new in line})
        for name, line in lines.items():
            mark, color = styles[name]
            points = sorted(line.items())
            axes.plot(*zip(*points, strict=True), marker=mark, color=color, markersize=5, linewidth=1.6)
        at = (switches or {}).get(title)
        if at is not None:
            axes.axvline(at, color=INK, linestyle="--", linewidth=1.2)
        axes.set(xscale="log", yscale="log", xlabel="new tokens of each sequence")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(counts, [str(count) for count in counts], fontsize=8.5)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us / 1000:g} ms" if us >= 1000 else f"{us:g} µs"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=EMPTY)
    handles = [Line2D([], [], marker=mark, color=color, label=name) for name, (mark, color) in styles.items()]
    if switches:
        handles.append(Line2D([], [], color=INK, linestyle="--", label="auto switches here"))
    drawing.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    return drawing
