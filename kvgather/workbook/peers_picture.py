"""A picture of our attention next to others: times relative to ours, against the number of new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from ..bench.peer_targets import LIMIT, OURS
from .figures import EMPTY, INK, LINE, PALETTE, figure
from .measured_peers import FORMS, LABELS, MeasuredPeers
from .peers_verdict import error_range, verdict

__all__ = ["peers_alt", "peers_picture"]

MARKS = ("o", "s", "^", "D")
COLORS = (PALETTE[2], PALETTE[0], PALETTE[5], PALETTE[3])
DASHES = ("-", "-", "--", ":")
STYLES: Mapping[str, dict[str, Any]] = {
    name: {"marker": mark, "color": color, "linestyle": dash}
    for name, mark, color, dash in zip(FORMS, MARKS, COLORS, DASHES, strict=True)
} | {LIMIT: {"marker": "*", "color": INK, "linestyle": "none"}}
TICKS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0)
NOTHING = "no recorded rows"


def peers_picture(layers: Mapping[str, Mapping[int, MeasuredPeers]]) -> Figure:
    """A panel for each layer: an implementation's time over ours, a line for each; the legend has their errors.

    Args:
        layers: by the layer's title, the batches by their number of new tokens; without one, the picture says so.
    """
    drawing, grid = figure(9.0, 4.3, columns=max(1, len(layers)), squeeze=False, sharey=True)
    if not layers:
        grid[0][0].set_axis_off()
        grid[0][0].text(0.5, 0.5, NOTHING, ha="center", va="center")
        return drawing
    measured = [at for points in layers.values() for at in points.values()]
    ratios = [ratio for at in measured for name in STYLES if (ratio := at.ratio(name)) is not None]
    for (title, points), axes in zip(layers.items(), grid[0], strict=True):
        _panel(axes, points)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(min(ratios) / 1.15, max(ratios) * 1.15)
    grid[0][0].set_ylabel("time over ours")
    handles: list[Artist] = []
    for name, style in STYLES.items():
        if any(name in at.times for at in measured):
            error = error_range(measured, name)
            text = f"{LABELS[name]}, error {error}" if error else LABELS[name]
            handles.append(Line2D([], [], label=text, markersize=_size(name), **style))
    handles.append(Patch(color=EMPTY, label="faster than ours"))
    drawing.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return drawing


def _panel(axes: Axes, points: Mapping[int, MeasuredPeers]) -> None:
    """The lines of one layer; our time is below each number of new tokens."""
    news = sorted(points)
    for name, style in STYLES.items():
        line = [(new, ratio) for new in news if (ratio := points[new].ratio(name)) is not None]
        if line:
            axes.plot(*zip(*line, strict=True), markersize=_size(name), linewidth=2.2 if name == OURS else 1.6, **style)
    axes.set(xscale="log", yscale="log", xlabel="new tokens of each sequence; time of ours")
    axes.axhspan(TICKS[0] / 10, 1.0, color=EMPTY, zorder=0, linewidth=0)
    axes.set_xticks(news, [f"{new}\n{_time(points[new].times[OURS])}" for new in news], fontsize=9)
    axes.margins(x=0.08)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(TICKS)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g} ×"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=LINE, alpha=0.3)


def _size(name: str) -> float:
    return 11.0 if name == LIMIT else 6.0


def _time(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.0f} µs"


def peers_alt(layers: Mapping[str, Mapping[int, MeasuredPeers]]) -> str:
    """The alt text of `peers_picture`."""
    if not layers:
        return f"An empty panel: {NOTHING}."
    told = " ".join(f"{title}: {verdict(points)}" for title, points in layers.items())
    return f"Times relative to ours against new tokens, a line for each implementation. {told}"
