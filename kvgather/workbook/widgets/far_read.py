"""Select a block id; see how far behind a scalar the kernel before the fix reads, and what is there."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import torch

from kvgather.lab.crash_map import Point, bytes_behind
from kvgather.workbook.figures import png
from kvgather.workbook.neighbour_picture import Neighbours, in_bytes, neighbour_picture, neighbours_of

__all__ = ["describe_read", "far_read"]

BLOCK_IDS = (0, *(2**n for n in range(21)))


def describe_read(
    block_id: int, heads: int, page_size: int, neighbours: Neighbours, points: Sequence[Point] = ()
) -> str:
    """One sentence: the element, its distance, what is there on this CPU, and what a GPU did if it was recorded."""
    offset = bytes_behind(block_id, heads, page_size)
    here = {
        "the scalar": "that is the scalar itself",
        "its page": "in the scalar's own page",
        "mapped": "on this CPU that is mapped: garbage",
        "not mapped": "on this CPU nothing is mapped there: a fault",
        "unknown": "this system does not tell what is mapped there",
    }[neighbours.at(offset)]
    text = f"block {block_id:,} reads element {block_id * heads * page_size:,}, {in_bytes(offset)} behind: {here}"
    for point in points:
        if point.bytes_behind == offset and not point.launch_blocking:
            text += f"; recorded on a GPU: {point.outcome}"
    return text


def far_read(
    block_id: int = 4096, heads: int = 8, page_size: int = 16, points: Sequence[Point] = ()
) -> ipywidgets.Widget:
    """The widget: sliders for the block id, the heads and the page size, a sentence and a picture.

    Args:
        block_id: 0 or a power of two up to 2²⁰; the first one shown.
        heads, page_size: powers of two up to 64; the first ones shown.
        points: the recorded map of a GPU.

    Raises:
        ValueError: `block_id`, `heads` or `page_size` is no value of its slider.
    """
    powers = [2**n for n in range(7)]
    for name, value, accepted in (
        ("block_id", block_id, BLOCK_IDS), ("heads", heads, powers), ("page_size", page_size, powers)
    ):  # fmt: skip
        if value not in accepted:
            raise ValueError(f"{name} is {value}; accepted: {accepted[0]} or a power of two up to {accepted[-1]}")
    scalar = torch.tensor([0.5])  # stays alive with the widget, so that its neighbours stay its neighbours
    ids = ipywidgets.SelectionSlider(
        options=[(f"{i:,}", i) for i in BLOCK_IDS], value=block_id, description="block id", continuous_update=False
    )
    head_count = ipywidgets.SelectionSlider(options=powers, value=heads, description="heads", continuous_update=False)
    pages = ipywidgets.SelectionSlider(
        options=powers, value=page_size, description="page size", continuous_update=False
    )
    sentence = ipywidgets.Label()
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))

    def redraw(_: object = None) -> None:
        neighbours, chosen = neighbours_of(scalar), (ids.value, head_count.value, pages.value)
        sentence.value = describe_read(*chosen, neighbours, points)
        picture.value = png(neighbour_picture(bytes_behind(*chosen), neighbours, points))

    for control in (ids, head_count, pages):
        control.observe(redraw, names="value")
    redraw()
    explorer = ipywidgets.VBox([ids, ipywidgets.HBox([head_count, pages]), sentence, picture])
    explorer.add_class("kvgather-far-read")
    return explorer
