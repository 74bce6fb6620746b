"""A picture of attention over wrong K and V, next to the right one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .figures import figure

__all__ = ["damage_picture"]


def damage_picture(runs: Mapping[str, tuple[Tensor, Tensor]], *, limit: float | None = None) -> Figure:
    """Softmax weights above outputs, a column for each run; all columns share their color scale.

    Args:
        runs: weights `[new, keys]` and output `[new, dim]`, by title.
        limit: outputs past ±limit get the last color; None means the first run's largest magnitude.
    """
    first = next(iter(runs.values()))[1]
    top = float(first.abs().max()) if limit is None else limit
    drawing, grid = figure(10.5, 3.9, rows=2, columns=len(runs), squeeze=False)
    colors: dict[str, Any] = {"weights": {"cmap": "Blues", "vmin": 0, "vmax": 1}}
    colors["output"] = {"cmap": "RdBu_r", "vmin": -top, "vmax": top}
    for column, (title, tensors) in enumerate(runs.items()):
        for row, (name, tensor) in enumerate(zip(colors, tensors, strict=True)):
            axes = grid[row][column]
            image = axes.imshow(np.asarray(tensor.cpu()), aspect="auto", interpolation="nearest", **colors[name])
            axes.set_yticks(range(0, tensor.shape[0], 2))
            axes.tick_params(length=0, labelsize=8)
            axes.set_xlabel("key" if row == 0 else "dim", fontsize=9)
            if row == 0:
                axes.set_title(title, fontsize=10)
            if column == 0:
                axes.set_ylabel(f"{name}\nnew token", fontsize=9)
            if column == len(runs) - 1:
                bar = drawing.colorbar(image, ax=list(grid[row]), pad=0.01, extend="both" if row else "neither")
                bar.ax.tick_params(labelsize=8)
    return drawing
