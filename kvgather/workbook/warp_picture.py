"""A picture of one load of one warp: the bytes that its lanes ask for, and the sectors that come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..lab.warps import SECTOR, sectors
from .access_picture import MOVED
from .figures import EMPTY, INK, PALETTE, figure

__all__ = ["warp_picture"]


def warp_picture(loads: Mapping[str, NDArray[np.int64]], size: int, *, label: str = "byte") -> Figure:
    """A panel for each load, with a row of boxes for each sector of the piece of memory that it reads from.

    Args:
        loads: by title, `[lanes, width]` byte addresses; −1 for lanes that are off.
        size: of a piece, in bytes; whole sectors, and pieces begin at its multiples.
        label: what the offsets beside the rows count.
    """
    rows = size // SECTOR
    drawing, grid = figure(3.5 * len(loads), 1.2 + 0.115 * rows, columns=len(loads), squeeze=False)
    for (title, addresses), axes in zip(loads.items(), grid[0], strict=True):
        asked = addresses[addresses >= 0].ravel()
        asked = asked - asked.min() // size * size
        _draw(axes, asked, rows)
        count = sectors(addresses)
        words = f"{len(np.unique(asked))} bytes from {count} sector{'s' if count > 1 else ''}"
        axes.set_title(f"{title}\n{words}", fontsize=9.5)
    grid[0][0].set_ylabel(label, fontsize=8.5)
    names = {"a byte that a lane asks for": PALETTE[0], "comes with it: the rest of the 32-byte sector": MOVED}
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color in names.values()]
    drawing.legend(handles, list(names), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return drawing


def _draw(axes: Axes, asked: NDArray[np.int64], rows: int) -> None:
    state = np.zeros(rows * SECTOR, int)
    state[(np.unique(asked // SECTOR)[:, None] * SECTOR + np.arange(SECTOR)).ravel()] = 1
    state[asked] = 2
    colors = ListedColormap([EMPTY, MOVED, PALETTE[0]])
    axes.pcolormesh(state.reshape(rows, SECTOR), cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=0.4)
    axes.set_xticks(range(0, SECTOR + 1, 16))
    axes.set_yticks([row + 0.5 for row in range(0, rows, 4)], [str(row * SECTOR) for row in range(0, rows, 4)])
    axes.grid(axis="x", color=INK, linewidth=0.6)
    axes.tick_params(length=0, labelsize=8)
    axes.set(ylim=(rows, 0), xlim=(0, SECTOR))
    for spine in axes.spines.values():
        spine.set_visible(False)
