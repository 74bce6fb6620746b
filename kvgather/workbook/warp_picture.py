"""A picture of one load of one warp: the bytes that its lanes load, and the sectors that the GPU moves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..lab.warps import SECTOR, sectors
from .access_picture import byte_legend, draw_bytes
from .figures import figure

__all__ = ["warp_picture"]


def warp_picture(loads: Mapping[str, NDArray[np.int64]], size: int, *, label: str = "byte") -> Figure:
    """A panel for each load, with a row of boxes for each sector of the piece of memory that it reads from.

    Args:
        loads: `[lanes, width]` byte addresses, by title; −1 for lanes that are masked off.
        size: bytes of a piece; a multiple of a sector, and pieces begin at multiples of it.
        label: unit of the offsets next to the rows.
    """
    rows = size // SECTOR
    drawing, grid = figure(3.5 * len(loads), 1.2 + 0.115 * rows, columns=len(loads), squeeze=False)
    for (title, addresses), axes in zip(loads.items(), grid[0], strict=True):
        loaded = addresses[addresses >= 0].ravel()
        loaded = loaded - loaded.min() // size * size
        draw_bytes(axes, loaded, rows, SECTOR)
        count = sectors(addresses)
        summary = f"{len(np.unique(loaded))} bytes from {count} sector{'s' if count > 1 else ''}"
        axes.set_title(f"{title}\n{summary}", fontsize=9.5)
    grid[0][0].set_ylabel(label, fontsize=8.5)
    byte_legend(drawing, "byte that a lane loads")
    return drawing
