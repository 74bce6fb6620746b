"""Pictures of speed: predicted and measured steps, and measurements below the memory's limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..bench.report import Row
from .figures import EMPTY, GOOD, INK, LINE, PALETTE, figure

__all__ = ["roofline_picture", "steps_picture"]

CAST, COPY = "contiguous cast", "contiguous copy"
MARKS = {
    "kvgather": ("o", GOOD),
    "token per program": ("s", PALETTE[5]),
    "upstream form": ("s", PALETTE[5]),
    "torch index": ("^", PALETTE[3]),
}


def steps_picture(rows: Mapping[str, Sequence[Row]], predicted: Mapping[str, Mapping[str, float]]) -> Figure:
    """A panel for each layout: a bar for each step, a diamond at its prediction, a line at the cast.

    Args:
        rows: measurements of the steps and of the limits, by layout.
        predicted: predicted GB/s by layout and step; a step without a prediction gets no diamond.
    """
    drawing, panels = figure(10.5, 3.3, columns=len(rows), squeeze=False, sharey=True)
    for (layout, measured), axes in zip(rows.items(), panels[0], strict=True):
        steps = [row for row in measured if row.implementation not in (CAST, COPY)]
        cast = next(row for row in measured if row.implementation == CAST)
        for place, row in enumerate(steps):
            axes.barh(place, row.gb_per_s, color=PALETTE[4], height=0.62)
            text: Any = {"ha": "left", "va": "center", "fontsize": 8.5, "color": INK}
            axes.text(0.015 * cast.gb_per_s, place, f"{row.gb_per_s:,.0f}", **text)
            if row.implementation in predicted[layout]:
                axes.plot(predicted[layout][row.implementation], place, "D", color=PALETTE[5], markersize=6, zorder=3)
        axes.axvline(cast.gb_per_s, color=INK, linewidth=1.2, linestyle="--")
        axes.set_yticks(range(len(steps)), [row.implementation for row in steps], fontsize=9)
        axes.set(ylim=(len(steps) - 0.5, -0.5), xlim=(0, 1.1 * cast.gb_per_s), xlabel="GB/s", title=layout)
        axes.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=PALETTE[4], linewidth=8, label="measured"),
        Line2D([], [], color=PALETTE[5], marker="D", linestyle="none", label="predicted"),
        Line2D([], [], color=INK, linestyle="--", label="the cast: the limit"),
    ]
    drawing.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return drawing


def roofline_picture(panels: Mapping[str, Sequence[Row]], *, spread: bool = False) -> Figure:
    """GB/s against bytes moved, a point for each measurement, below the limits of the same runs.

    Args:
        panels: measurements by the panel's title, including the cast and the copy of each case; other implementations
            than these and those of `MARKS` are not drawn.
        spread: whether each point has a bar from its 80th percentile of time to its 20th.
    """
    drawing, grid = figure(10.5 if len(panels) > 1 else 8.0, 4.0, columns=len(panels), squeeze=False)
    for (title, measured), axes in zip(panels.items(), grid[0], strict=True):
        rows = [row for row in measured if row.implementation in (*MARKS, CAST, COPY)]
        _roof(axes, rows)
        for name, (mark, color) in MARKS.items():
            chosen = [row for row in rows if row.implementation == name]
            rates = [row.bytes / row.p50_us / 1e3 if spread else row.gb_per_s for row in chosen]  # rounded in a row
            if points := list(zip([row.bytes for row in chosen], rates, strict=True)):
                axes.plot(*zip(*points, strict=True), mark, color=color, markersize=5, alpha=0.8, label=name)
            if spread:
                for row in chosen:
                    ends = [row.bytes / time / 1e3 for time in (row.p80_us, row.p20_us)]
                    axes.plot([row.bytes] * 2, ends, color=color, linewidth=1.5)
        axes.set(xscale="log", yscale="log", xlabel="bytes that have to move", ylabel="GB/s", title=title)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _bytes(size)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_apart(sorted({row.bytes for row in rows})))
        axes.grid(axis="y", color=EMPTY)
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles, loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return drawing


def _roof(axes: Axes, rows: Sequence[Row]) -> None:
    """The best cast and the best copy of each size, as lines."""
    for name, style, color in ((CAST, "-", INK), (COPY, ":", LINE)):
        best: dict[int, float] = {}
        for row in rows:
            if row.implementation == name:
                best[row.bytes] = max(best.get(row.bytes, 0.0), row.gb_per_s)
        points: list[tuple[float, float]] = sorted(best.items())
        if len(points) == 1:
            points = [(points[0][0] * factor, points[0][1]) for factor in (0.7, 1.4)]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, linewidth=1.4, label=name)


def _apart(sizes: Sequence[int]) -> list[int]:
    """The largest of the sorted sizes, and the smaller ones whose labels do not overlap."""
    labelled: list[int] = []
    for size in reversed(sizes):
        if not labelled or 1.8 * size < labelled[-1]:
            labelled.append(size)
    return labelled


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
