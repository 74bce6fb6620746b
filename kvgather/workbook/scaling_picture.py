"""Time and efficiency against the number of GPUs, with the ideal, from the rows of `kvgather bench parallel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from ..bench.ranks import rows
from .figures import EMPTY, INK, PALETTE, figure

__all__ = ["Scaled", "read_scaling", "scaling_alt", "scaling_picture"]

MARKS = "os^Dv"


@dataclass(frozen=True)
class Scaled:
    """One case on several GPUs.

    Attributes:
        ranks, context, new: numbers of GPUs, cached tokens and new tokens.
        us: time of one call on all GPUs, in µs: in a CUDA graph, or eagerly where there is no graph.
        eager_us: time of one eager call, with the host's part; None if it was not measured.
        one_us: time on one GPU that has the whole context, measured beside `us` in the same way; None if it was not.
        one_eager_us: as `one_us`, of one eager call.
        received, least: bytes that one call brings to a GPU, and that it has to bring at least.
        layer: heads, layout and scale of the layer, such as 64q8x64-NHD-per-tensor.
        device: name of the GPUs.
        about: whether `us` is of a CUDA graph, and their link, versions and date.
    """

    ranks: int
    context: int
    new: int
    us: float
    eager_us: float | None
    one_us: float | None
    one_eager_us: float | None
    received: int
    least: int
    layer: str
    device: str
    about: str

    @property
    def ideal_us(self) -> float | None:
        """The time on one GPU, divided by the number of GPUs."""
        return None if self.one_us is None else self.one_us / self.ranks

    @property
    def efficiency(self) -> float | None:
        """The ideal over the time."""
        return None if self.ideal_us is None else self.ideal_us / self.us


def read_scaling(folder: Path, name: str = "parallel_*.csv") -> list[Scaled]:
    """The measured cases of all files of a folder that fit to a name, by device, new tokens, context and ranks.

    Args:
        folder: of the results.
        name: pattern of the files' names.

    Raises:
        ValueError: the columns of a file are not those of `kvgather bench parallel`.
    """
    found = []
    for path in sorted(folder.glob(name)):
        read = rows.read(path)
        alone = {(row.case, row.ranks, row.device): row for row in read if row.what == rows.ONE}
        found += [
            _scaled(row, alone.get((row.case, row.ranks, row.device))) for row in read if row.what == rows.TOGETHER
        ]
    return sorted(found, key=lambda case: (case.device, case.new, case.context, case.ranks))


def _scaled(row: rows.Row, alone: rows.Row | None) -> Scaled:
    """A case from its own row, and that of one GPU."""
    in_graph = row.graph_us is not None
    us = row.graph_us if in_graph else row.eager_us
    one_eager_us = None if alone is None else alone.eager_us
    one_us = alone.graph_us if alone is not None and in_graph else one_eager_us
    assert us is not None and row.bytes_received is not None and row.bytes_least is not None
    about = f"{'in a CUDA graph' if in_graph else 'eager'}, {row.link}, torch {row.torch}, NCCL {row.nccl}, {row.date}"
    return Scaled(
        row.ranks, row.context, row.new, us, row.eager_us, one_us, one_eager_us, row.bytes_received, row.bytes_least,
        row.case.partition("-1seqs")[0], row.device, about,
    )  # fmt: skip


def scaling_picture(measured: Sequence[Scaled]) -> Figure:
    """Above, time against the number of GPUs; below, efficiency. A column for each number of new tokens.

    A line for each context begins at one GPU, if it was measured there. One GPU is measured again beside each number of
    GPUs: all these times are drawn, and a dashed line goes from each to its ideal.

    Args:
        measured: cases of one device.
    """
    news = sorted({case.new for case in measured})
    contexts = sorted({case.context for case in measured})
    counts = sorted({1, *(case.ranks for case in measured)})
    drawing, grid = figure(
        10.5 if len(news) > 1 else 5.5, 5.0, rows=2, columns=len(news), squeeze=False, sharex=True, sharey="row",
        height_ratios=[1.5, 1.0],
    )  # fmt: skip
    for column, new in enumerate(news):
        time, share = grid[0][column], grid[1][column]
        for place, context in enumerate(contexts):
            cases = [case for case in measured if case.new == new and case.context == context]
            style = {"color": PALETTE[place % len(PALETTE)], "marker": MARKS[place % len(MARKS)], "markersize": 5.0}
            points = [(case.ranks, case.us) for case in cases]
            alone = [(case.ranks, case.one_us, case.ideal_us) for case in cases if case.one_us is not None]
            for ranks, one_us, ideal_us in alone:
                time.plot([1, ranks], [one_us, ideal_us], color=INK, linewidth=1.0, linestyle="--")
            if alone:
                points = [(1, alone[0][1]), *points]
                time.plot([1] * len(alone), [one_us for _, one_us, _ in alone], linestyle="", **style)
            if points:
                time.plot(*zip(*points, strict=True), **style)
            shares = [(case.ranks, case.efficiency) for case in cases if case.efficiency is not None]
            if shares:
                share.plot(*zip(*shares, strict=True), **style)
        share.axhline(1.0, color=INK, linewidth=1.0, linestyle="--")
        time.set(xscale="log", yscale="log", title=f"{new:,} new token{'s' * (new > 1)}")
        time.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us / 1000:g} ms" if us >= 1000 else f"{us:g} µs"))
        time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        time.yaxis.set_minor_locator(NullLocator())
        share.set(xscale="log", xlabel="GPUs", ylim=(0, 1.12))
        share.yaxis.set_major_formatter(PercentFormatter(1.0))
        share.xaxis.set_minor_locator(NullLocator())
        share.set_xticks(counts, [str(count) for count in counts])
        for axes in (time, share):
            axes.grid(axis="y", color=EMPTY)
    grid[0][0].set_ylabel("time of one call")
    grid[1][0].set_ylabel("efficiency")
    handles = [
        Line2D([], [], color=PALETTE[i % len(PALETTE)], marker=MARKS[i % len(MARKS)], label=f"{context:,} tokens")
        for i, context in enumerate(contexts)
    ]
    handles.append(Line2D([], [], color=INK, linestyle="--", label="ideal"))
    drawing.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    return drawing


def scaling_alt(measured: Sequence[Scaled]) -> str:
    """The alt text of `scaling_picture`."""
    shares = [case for case in measured if case.efficiency is not None]
    text = (
        f"Time and efficiency against the number of GPUs, for {len({case.new for case in measured})} numbers of new "
        f"tokens and {len({case.context for case in measured})} contexts, with the ideals as dashed lines."
    )
    if not shares:
        return text
    worst, best = (_told(pick(shares, key=lambda case: case.efficiency or 0.0)) for pick in (min, max))
    return f"{text} The lowest efficiency is {worst}; the highest {best}."


def _told(case: Scaled) -> str:
    tokens = f"{case.new:,} new token{'s' * (case.new > 1)} at {case.context:,}"
    return f"{case.efficiency:.0%}, with {tokens} on {case.ranks} GPUs"
