"""Pictures of softmax rows: the shares of the keys and of the sink, and the error of a sink that is counted twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from .figures import EMPTY, PALETTE, figure

__all__ = ["shares_picture", "sink_error_picture"]

KEYS, SINK = PALETTE[0], PALETTE[3]


def shares_picture(rows: Mapping[str, Sequence[float]]) -> Figure:
    """A panel for each row of weights: a bar for each key, and one for the sink's share, the rest up to 1.

    Args:
        rows: weights of the keys, by title.
    """
    drawing, panels = figure(10.5, 2.5, columns=len(rows), squeeze=False, sharey=True)
    for (title, weights), axes in zip(rows.items(), panels[0], strict=True):
        axes.bar(range(len(weights)), weights, color=KEYS, width=0.85)
        lost = 1.0 - float(np.sum(weights))
        if lost > 1e-4:
            axes.bar(len(weights) + 1, lost, color=SINK, width=1.6, hatch="//", edgecolor="white")
        axes.text(len(weights) + 1, max(lost, 0.0) + 0.01, f"{lost:.0%}", ha="center", va="bottom", fontsize=9)
        axes.set_xticks([0, len(weights) - 1, len(weights) + 1], ["0", str(len(weights) - 1), "sink"], fontsize=8.5)
        axes.get_xticklabels()[-1].set_ha("left")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("key")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.tick_params(axis="x", length=0)
    panels[0][0].set_ylabel("share")
    return drawing


def sink_error_picture(errors: Mapping[str, Mapping[int, float]]) -> Figure:
    """The relative error of the output against the number of pieces of the context, a line for each sink.

    Args:
        errors: by the sink's name, the error by the number of pieces, each of which counts the sink.
    """
    drawing, axes = figure(8.0, 3.2)
    for (name, line), mark in zip(errors.items(), "os^Dv", strict=False):
        axes.plot(list(line), list(line.values()), marker=mark, label=name)
        last = max(line)
        axes.annotate(name, (last, line[last]), (6, 0), textcoords="offset points", va="center", fontsize=9)
    counts = sorted({count for line in errors.values() for count in line})
    axes.set(xscale="log", xlabel="pieces that the context is read in", ylabel="relative error", ylim=(-0.04, 1.02))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(counts[0] * 0.93, counts[-1] * 1.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=EMPTY)
    return drawing
