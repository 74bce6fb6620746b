"""Select a layout and an element; see its byte, its neighbours and its 16-byte load."""

from __future__ import annotations

import ipywidgets

from kvgather.formats.layout import LAYOUTS
from kvgather.workbook.figures import png
from kvgather.workbook.layout_picture import SMALL, PoolSizes, locate, place_picture

__all__ = ["WIDGET_DPI", "layout_explorer"]

WIDGET_DPI = 80
"""Dots per inch: at 140 a redraw takes more than 200 ms on one core."""


def layout_explorer(
    layout: str = "SHUFFLE",
    which: str = "key",
    block: int = 1,
    head: int = 1,
    page_offset: int = 5,
    dim: int = 20,
    sizes: PoolSizes = SMALL,
) -> ipywidgets.Widget:
    """The widget: buttons for the layout and for K or V, a slider for each index, a sentence and a picture.

    Args:
        layout: "NHD", "HND" or "SHUFFLE".
        which: "key" or "value".
        block, head, page_offset, dim: the element shown first.
        sizes: sizes of the pool.

    Raises:
        ValueError: the layout is unknown, or an index is outside the pool.
    """
    first = locate(layout, "value" if which == "value" else "key", block, head, page_offset, dim, sizes)
    layouts = ipywidgets.ToggleButtons(options=LAYOUTS, value=layout, description="layout")
    pools = ipywidgets.ToggleButtons(options=[("K", "key"), ("V", "value")], value=first.which, description="pool")
    indices = {
        "block": (block, sizes.blocks),
        "head": (head, sizes.heads),
        "page_offset": (page_offset, sizes.page),
        "dim": (dim, sizes.dim),
    }
    sliders = {
        # Drawn when the slider is released: pictures for all values on the way would queue up.
        name: ipywidgets.IntSlider(value=value, max=size - 1, description=name, continuous_update=False)
        for name, (value, size) in indices.items()
    }
    sentence = ipywidgets.Label()
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))

    def redraw(_: object = None) -> None:
        chosen = {name: slider.value for name, slider in sliders.items()}
        place = locate(layouts.value, pools.value, **chosen, sizes=sizes)
        sentence.value = str(place)
        picture.value = png(place_picture(place), dpi=WIDGET_DPI)

    for control in (layouts, pools, *sliders.values()):
        control.observe(redraw, names="value")
    redraw()
    choices = ipywidgets.HBox([layouts, pools])
    rows = [
        ipywidgets.HBox([sliders["block"], sliders["head"]]),
        ipywidgets.HBox([sliders["page_offset"], sliders["dim"]]),
    ]
    explorer = ipywidgets.VBox([choices, *rows, sentence, picture])
    explorer.add_class("kvgather-layout-explorer")
    return explorer
