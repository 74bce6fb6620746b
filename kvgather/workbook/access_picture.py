"""Pictures of what a kernel touched, drawn from a trace: the bytes of a page, and the elements of a scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..lab.trace import Trace
from .figures import BAD, EMPTY, GOOD, INK, PALETTE, figure, legend

__all__ = ["SECTOR", "page_picture", "scale_picture", "sectors"]

SECTOR = 32
"""Bytes that an NVIDIA GPU moves at the least, from its cache or from memory."""

MOVED = "#B7DCF2"
POOLS = {"key_cache_ptr": "K", "value_cache_ptr": "V"}


def sectors(touched: NDArray[np.int64]) -> NDArray[np.int64]:
    """The 32-byte sectors that hold these bytes, each once."""
    return np.unique(touched // SECTOR)


def page_picture(
    traces: Mapping[str, Trace], program: tuple[int, ...], page_bytes: int, *, columns: int = 64
) -> Figure:
    """The bytes of one page of K and of V that one program loads, one row of pictures per trace.

    Args:
        traces: by the name of the layout that was gathered.
        program: whose loads to draw; they lie in one page.
        page_bytes: bytes of a page, all heads.
        columns: bytes in a row of the picture.
    """
    rows = page_bytes // columns
    drawing, grid = figure(10.5, 0.9 + len(traces) * (0.75 + 0.15 * rows), len(traces), len(POOLS), squeeze=False)
    for (layout, trace), line in zip(traces.items(), grid, strict=True):
        for (argument, pool), axes in zip(POOLS.items(), line, strict=True):
            touched = trace.bytes_touched(argument, program, "load")
            page = int(touched[0]) // page_bytes
            _draw_page(axes, touched - page * page_bytes, rows, columns)
            used, moved = len(touched), SECTOR * len(sectors(touched))
            axes.set_title(f"{pool} in {layout}: {used} bytes used, {moved} moved", fontsize=10)
    names = {"a byte the program asks for": PALETTE[0], "comes with it: the rest of the 32-byte sector": MOVED}
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color in names.values()]
    drawing.legend(handles, list(names), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return drawing


def _draw_page(axes: Axes, touched: NDArray[np.int64], rows: int, columns: int) -> None:
    """One page, coloured by what is asked for and what moves; thin lines every 16 bytes."""
    state = np.zeros(rows * columns, int)
    state[(sectors(touched)[:, None] * SECTOR + np.arange(SECTOR)).ravel()] = 1
    state[touched] = 2
    colors = ListedColormap([EMPTY, MOVED, PALETTE[0]])
    axes.pcolormesh(state.reshape(rows, columns), cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=0.4)
    axes.set_xticks(range(0, columns + 1, 16))
    axes.set_yticks([row + 0.5 for row in range(0, rows, 4)], [str(row * columns) for row in range(0, rows, 4)])
    axes.grid(axis="x", color=INK, linewidth=0.6)
    axes.tick_params(length=0, labelsize=8)
    axes.set(ylim=(rows, 0), xlim=(0, columns))
    axes.set_ylabel("byte of the page", fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def scale_picture(
    trace: Trace, argument: str, *, num_blocks: int, num_heads: int, page_size: int, title: str = ""
) -> Figure:
    """The `[block, head, slot]` grid that a kernel imagines, the elements that exist, and those it read.

    Args:
        trace: of a launch that reads the scale.
        argument: the scale's name in the kernel, such as "k_scale_ptr".
        num_blocks, num_heads, page_size: of the grid; a row of boxes is a block.
        title: above the picture.
    """
    per_block = num_heads * page_size
    accesses = list(trace.select(argument, kind="load"))
    size = max((a.size for a in accesses), default=0)
    read = {int(e) for a in accesses for e in np.atleast_1d(a.elements)[np.atleast_1d(a.mask)]}
    drawing, axes = figure(10.5, 1.15 + 0.3 * num_blocks)
    for element in range(num_blocks * per_block):
        block, column = divmod(element, per_block)
        color = GOOD if element < size else EMPTY
        axes.add_patch(Rectangle((column, block), 1, 1, facecolor=color, edgecolor="white", linewidth=1.0))
        if element in read:
            _mark(axes, column, block, element < size)
    for head in range(num_heads):
        at = head * page_size
        axes.text(at + page_size / 2, num_blocks + 0.25, f"head {head}, slots 0 to {page_size - 1}",
                  ha="center", va="top", fontsize=9)  # fmt: skip
        if head:
            axes.plot([at, at], [0, num_blocks], color=INK, linewidth=1.0)
    for block in range(num_blocks):
        axes.text(-0.3, block + 0.5, f"block {block}", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-2.6, per_block + 0.05), ylim=(num_blocks + 1.0, -0.05), aspect="equal")
    axes.set_axis_off()
    kinds = {f"exists ({size})": GOOD}
    if size < num_blocks * per_block:
        kinds["does not exist"] = EMPTY
    outside = sum(element >= size for element in read)
    if len(read) > outside:
        kinds[f"• read, inside ({len(read) - outside})"] = "white"
    if outside:
        kinds[f"× read, outside ({outside})"] = BAD
    legend(axes, kinds, bbox_to_anchor=(0.07, 1.0))
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return drawing


def _mark(axes: Axes, column: int, block: int, inside: bool) -> None:
    """A dot for a read that is allowed, a cross on red for one that is not."""
    style: Any = {"ha": "center", "va": "center", "fontsize": 9, "color": "white", "fontweight": "bold"}
    if inside:
        axes.plot(column + 0.5, block + 0.5, marker="o", markersize=3.5, color="white")
        return
    axes.add_patch(Rectangle((column, block), 1, 1, facecolor=BAD, edgecolor="white", linewidth=1.0))
    axes.text(column + 0.5, block + 0.47, "×", **style)
