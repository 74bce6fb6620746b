"""Where a read lands that is far behind a scalar: in memory that is mapped, or not; and the recorded map of a GPU."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..lab.crash_map import SCALE_BYTES, Point, bytes_behind
from .figures import BAD, EMPTY, GOOD, INK, LINE, PALETTE, PAPER, figure, text_color

__all__ = ["FAR", "Neighbours", "in_bytes", "map_picture", "neighbour_picture", "neighbours_of"]

FAR = 2**30
"""Bytes behind the scalar that are drawn."""
SEGMENT = 2 * 2**20
"""Bytes of a segment of torch's allocator on a GPU for tensors of less than 1 MiB: the scalar's segment."""
PAGE, MAPPED = "#6FB5DE", "#B7DCF2"
OUTCOMES = {
    "ok": ("o", GOOD, "right"),
    "silent corruption": ("s", PALETTE[6], "wrong values, no error"),
    "illegal access": ("X", BAD, "fault"),
    "abort": ("X", BAD, "fault"),
}
REPORTED = {"the gather": "the\ngather", "the next call": "the\nnext\ncall", "the copy to the host": "the\ncopy"}


@dataclass(frozen=True)
class Neighbours:
    """The memory behind a CPU tensor.

    Attributes:
        page_end: bytes from the tensor's first byte to the end of its page of memory.
        mapped: the readable ranges up to `FAR`, as (first, end) in bytes from the tensor's first byte; empty if the
            system does not tell.
    """

    page_end: int
    mapped: tuple[tuple[int, int], ...]

    def at(self, offset: int) -> str:
        """What an offset is in: "the scalar", "its page", "mapped", "not mapped" or "unknown"."""
        if offset < SCALE_BYTES:
            return "the scalar"
        if offset < self.page_end:
            return "its page"
        if not self.mapped:
            return "unknown"
        return "mapped" if any(first <= offset < end for first, end in self.mapped) else "not mapped"


def neighbours_of(tensor: Tensor) -> Neighbours:
    """The memory behind a CPU tensor, from this process's own table of mappings (on Linux)."""
    address = tensor.data_ptr()
    ranges = []
    table = Path("/proc/self/maps")
    for line in table.read_text().splitlines() if table.exists() else []:
        span, rights = line.split()[:2]
        first, end = (int(text, 16) - address for text in span.split("-"))
        if rights.startswith("r") and end > 0 and first < FAR:
            ranges.append((max(first, 0), min(end, FAR)))
    return Neighbours(mmap.PAGESIZE - address % mmap.PAGESIZE, tuple(ranges))


def in_bytes(size: int) -> str:
    """A number of bytes in words: "2 MiB", "1.5 KiB", "64 bytes"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} byte{'' if size == 1 else 's'}"


def neighbour_picture(offset: int, neighbours: Neighbours, points: Sequence[Point] = (), *, title: str = "") -> Figure:
    """The bytes behind a scalar on a logarithmic axis, and a read: on this CPU, and on a GPU.

    Args:
        offset: bytes from the scalar to the read.
        neighbours: the memory behind a scalar of this process.
        points: the recorded map of a GPU; only its runs without CUDA_LAUNCH_BLOCKING are drawn.
        title: text above the picture.
    """
    drawing, axes = figure(10.5, 2.6)
    _strip(axes, 0, [(0, neighbours.page_end, PAGE), *((a, b, MAPPED) for a, b in neighbours.mapped)])
    _strip(axes, 1, [(0, SEGMENT, MAPPED)])
    labels = {}
    for point in points:
        if not point.launch_blocking and point.outcome in OUTCOMES:
            mark, color, name = OUTCOMES[point.outcome]
            (labels[name],) = axes.plot(
                _place(point.bytes_behind), 1.5, mark, color=color, markeredgecolor=INK, markersize=8, linestyle="none",
                clip_on=False, zorder=3,
            )  # fmt: skip
    axes.axvline(_place(min(offset, FAR)), color=INK, linewidth=2)
    style: Any = {"ha": "center", "va": "bottom", "fontsize": 9, "fontweight": "bold"}
    axes.text(_place(min(offset, FAR)), -0.06, f"{in_bytes(offset)} behind", **style)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=color, edgecolor=LINE, hatch=hatch)
        for color, hatch in ((PAGE, ""), (MAPPED, ""), (EMPTY, "////"))
    ]
    axes.legend(
        [*handles, *labels.values()], ["the scalar's page", "mapped", "not mapped, or not known", *labels],
        loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=5, fontsize=9, frameon=False,
    )  # fmt: skip
    axes.set(xlim=(_place(0), _place(FAR)), ylim=(2, 0), xlabel="bytes behind the scalar")
    axes.set_xticks([_place(2**n) for n in range(2, 31, 4)], [in_bytes(2**n) for n in range(2, 31, 4)], fontsize=9)
    axes.set_yticks([0.5, 1.5], ["CPU, this\nprocess", "GPU,\nrecorded" if labels else "GPU,\nits segment"], fontsize=9)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return drawing


def _place(offset: int) -> float:
    """The place of an offset on the axis; the scalar itself takes the first step."""
    return math.log2(max(offset, SCALE_BYTES // 2))


def _strip(axes: Axes, row: int, ranges: Sequence[tuple[int, int, str]]) -> None:
    """One row: hatched, with the mapped ranges on it."""
    left, right = _place(0), _place(FAR)
    box: Any = {"edgecolor": LINE, "linewidth": 0}
    axes.add_patch(Rectangle((left, row + 0.15), right - left, 0.7, facecolor=EMPTY, hatch="////", **box))
    for first, end, color in reversed(ranges):
        axes.add_patch(Rectangle((_place(first), row + 0.15), _place(end) - _place(first), 0.7, facecolor=color, **box))
    axes.add_patch(Rectangle((left, row + 0.15), _place(SCALE_BYTES) - left, 0.7, facecolor=INK, **box))


def map_picture(points: Sequence[Point]) -> Figure:
    """A cell for each recorded block id, in a row for each value of CUDA_LAUNCH_BLOCKING: its outcome, and which call
    reported the error.

    Args:
        points: the recorded map of a GPU.

    Raises:
        ValueError: a point's outcome is not one that a map has.
    """
    unknown = sorted({point.outcome for point in points} - set(OUTCOMES))
    if unknown:
        raise ValueError(f"points have the outcome {unknown[0]!r}; accepted: {', '.join(OUTCOMES)}")
    ids = sorted({point.block_id for point in points})
    rows = sorted({point.launch_blocking for point in points})
    drawing, axes = figure(10.5, 1.1 + 0.8 * len(rows))
    for point in points:
        x, y = ids.index(point.block_id), rows.index(point.launch_blocking)
        color = OUTCOMES[point.outcome][1]
        hatch = "//" if point.raised_by else None
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor=PAPER, linewidth=1.5, hatch=hatch))
        text = REPORTED.get(point.raised_by, {"ok": "right", "silent corruption": "wrong"}.get(point.outcome, "abort"))
        style: Any = {"ha": "center", "va": "center", "fontsize": 8, "color": text_color(color), "linespacing": 1.0}
        axes.text(x + 0.5, y + 0.5, text, bbox={"facecolor": color, "edgecolor": "none", "pad": 1.0}, **style)
    axes.set(xlim=(0, len(ids)), ylim=(len(rows), 0))
    axes.set_xlabel("block id, and how far behind the scalar its scale is read")
    names = [f"{i:,}\n{in_bytes(bytes_behind(i))}" for i in ids]
    axes.set_xticks([x + 0.5 for x in range(len(ids))], names, fontsize=7)
    labels = ["CUDA_LAUNCH_\nBLOCKING=1" if blocking else "as it is" for blocking in rows]
    axes.set_yticks([y + 0.5 for y in range(len(rows))], labels, fontsize=8.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = {OUTCOMES[p.outcome][2]: Rectangle((0, 0), 1, 1, facecolor=OUTCOMES[p.outcome][1]) for p in points}
    names = [f"{name}, reported by" if name == "fault" else name for name in handles]
    drawing.legend(list(handles.values()), names, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return drawing
