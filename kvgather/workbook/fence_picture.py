"""A picture of a fenced tensor's memory and of the bytes that a kernel loads, from the tensor and from a trace."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..lab.trace import Trace
from .figures import BAD, EMPTY, GOOD, INK, figure, legend

__all__ = ["fence_picture"]


def fence_picture(tensor: Tensor, traces: Mapping[str, tuple[Trace, str]], *, before: int = 192) -> Figure:
    """The end of a tensor that is fenced after its last byte, the guard page, and the loads of one or more launches.

    Args:
        tensor: a CPU tensor, fenced with side "after".
        traces: by the title of a row, a trace and the tensor's name in its kernel.
        before: bytes of the page before the tensor to show.

    Raises:
        ValueError: the tensor does not end at the end of a page.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if (tensor.data_ptr() + nbytes) % mmap.PAGESIZE:
        raise ValueError("tensor does not end with its page; accepted: a tensor fenced after its last byte")
    loads = {name: trace.bytes_touched(argument, kind="load") for name, (trace, argument) in traces.items()}
    end = max([nbytes, *(int(touched.max()) + 1 for touched in loads.values() if touched.size)])
    right = end + before
    drawing, axes = figure(10.5, 1.25 + 0.62 * len(loads))
    for row, (name, touched) in enumerate(loads.items()):
        _strip(axes, row, -before, nbytes, right)
        for start in touched[:: tensor.element_size()]:
            color = GOOD if 0 <= start < nbytes else BAD
            load = Rectangle((start, row + 0.3), tensor.element_size(), 0.4, facecolor=color, edgecolor="white", lw=0.4)
            axes.add_patch(load)
        axes.text(-before - 8, row + 0.5, name, ha="right", va="center", fontsize=9)
    for text, left, stop in (("mapped", -before, 0), ("guard: no reading, no writing", nbytes, right)):
        axes.text((left + stop) / 2, -0.05, text, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(-before, right), ylim=(len(loads), 0))
    axes.set_xlabel(f"byte, counted from the tensor's first (it has {nbytes})")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    colors = {"the tensor": INK, "a load, inside": GOOD, "a load, outside": BAD}
    legend(axes, colors, bbox_to_anchor=(0, 1.14), fontsize=9)
    return drawing


def _strip(axes: Axes, row: int, left: int, nbytes: int, right: int) -> None:
    """One row: the page up to the tensor's end, the tensor, and the guard page, hatched."""
    axes.add_patch(Rectangle((left, row + 0.15), nbytes - left, 0.7, facecolor="#DDE7EE", edgecolor="none"))
    axes.add_patch(Rectangle((0, row + 0.15), nbytes, 0.7, facecolor=INK, edgecolor="none"))
    guard = Rectangle(
        (nbytes, row + 0.15), right - nbytes, 0.7, facecolor=EMPTY, edgecolor="#C9C9C2", hatch="////", linewidth=0
    )
    axes.add_patch(guard)
