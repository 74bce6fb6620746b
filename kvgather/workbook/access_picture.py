"""Pictures of a kernel's loads, from a trace: the bytes of a page, and the elements of a scale."""

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

__all__ = ["SECTOR", "byte_legend", "draw_bytes", "page_picture", "scale_picture", "sectors"]

SECTOR = 32
"""The smallest number of bytes that an NVIDIA GPU moves, from its cache or from memory."""

MOVED = "#B7DCF2"
POOLS = {"key_cache_ptr": "K", "value_cache_ptr": "V"}


def sectors(touched: NDArray[np.int64]) -> NDArray[np.int64]:
    """The 32-byte sectors of these bytes, each once."""
    return np.unique(touched // SECTOR)


def page_picture(
    traces: Mapping[str, Trace], program: tuple[int, ...], page_bytes: int, *, columns: int = 64
) -> Figure:
    """The bytes of one page of K and of V that one program loads, a row of pictures for each trace.

    Args:
        traces: traces of a gather, by the name of the layout.
        program: the program whose loads are drawn; they are in one page.
        page_bytes: bytes of a page, all heads.
        columns: bytes in a row of the picture.

    Raises:
        ValueError: the program loads nothing.
    """
    rows = page_bytes // columns
    drawing, grid = figure(10.5, 0.9 + len(traces) * (0.75 + 0.15 * rows), len(traces), len(POOLS), squeeze=False)
    for (layout, trace), line in zip(traces.items(), grid, strict=True):
        for (argument, pool), axes in zip(POOLS.items(), line, strict=True):
            touched = trace.bytes_touched(argument, program, "load")
            if not len(touched):
                grids = sorted({launch.grid for launch in trace.launches})
                raise ValueError(f"program is {program}, which loads nothing; accepted: programs of the grid {grids}")
            page = int(touched[0]) // page_bytes
            draw_bytes(axes, touched - page * page_bytes, rows, columns)
            axes.set_ylabel("byte of the page", fontsize=8)
            used, moved = len(touched), SECTOR * len(sectors(touched))
            axes.set_title(f"{pool} in {layout}: {used} bytes used, {moved} moved", fontsize=10)
    byte_legend(drawing, "byte that the program loads")
    return drawing


def draw_bytes(axes: Axes, touched: NDArray[np.int64], rows: int, columns: int) -> None:
    """Draw bytes of memory in rows: those that are loaded, and the rest of their sectors; a line every 16 bytes.

    Args:
        axes: to draw into.
        touched: offsets of the loaded bytes from the first byte of the picture.
        rows, columns: size of the picture, in bytes.
    """
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
    for spine in axes.spines.values():
        spine.set_visible(False)


def byte_legend(drawing: Figure, loaded: str) -> None:
    """The legend of `draw_bytes`; `loaded` names a loaded byte."""
    names = {loaded: PALETTE[0], "rest of the 32-byte sector, moved with it": MOVED}
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color in names.values()]
    drawing.legend(handles, list(names), loc="outside upper left", ncols=2, frameon=False, fontsize=9)


def scale_picture(
    trace: Trace, argument: str, *, num_blocks: int, num_heads: int, page_size: int, title: str = ""
) -> Figure:
    """The `[block, head, page_offset]` grid that a kernel assumes, the elements that exist, and those it reads.

    Args:
        trace: trace of a launch that reads the scale.
        argument: the scale's name in the kernel, such as "k_scale_ptr".
        num_blocks, num_heads, page_size: size of the grid; a row of boxes is a block.
        title: text above the picture.
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
        axes.text(at + page_size / 2, num_blocks + 0.25, f"head {head}, page_offset 0 to {page_size - 1}",
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
    """A dot for a read inside the tensor, a cross on red for a read outside."""
    style: Any = {"ha": "center", "va": "center", "fontsize": 9, "color": "white", "fontweight": "bold"}
    if inside:
        axes.plot(column + 0.5, block + 0.5, marker="o", markersize=3.5, color="white")
        return
    axes.add_patch(Rectangle((column, block), 1, 1, facecolor=BAD, edgecolor="white", linewidth=1.0))
    axes.text(column + 0.5, block + 0.47, "×", **style)
