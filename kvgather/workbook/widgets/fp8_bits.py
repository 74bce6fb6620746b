"""Chapter 02: the eight bits of a byte, and the value that each FP8 format gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvgather.formats.fp8 import FORMATS, Fp8Format, decode_table
from kvgather.workbook.figures import PALETTE, boxes, figure, legend, png

__all__ = ["bits_of", "bits_picture", "code_of", "fp8_bits", "reading"]

COLORS = {"sign": PALETTE[3], "exponent": PALETTE[1], "mantissa": PALETTE[4]}


def bits_of(code: int) -> list[int]:
    """The eight bits of a code, bit 7 first.

    Raises:
        ValueError: the code is not in 0 to 255.
    """
    if not 0 <= code <= 255:
        raise ValueError(f"code is {code}; accepted: 0 to 255")
    return [code >> bit & 1 for bit in range(7, -1, -1)]


def code_of(bits: Sequence[int]) -> int:
    """The code of eight bits, bit 7 first."""
    return sum(bit << place for place, bit in zip(range(7, -1, -1), bits, strict=True))


def reading(code: int, fmt: Fp8Format) -> str:
    """How a format reads a code: its value, with the product that gives it."""
    value = float(decode_table(fmt.dtype)[code])
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return f"{'−' if value < 0 else '+'}infinity"
    steps = 1 << fmt.mantissa_bits
    exponent, mantissa = code >> fmt.mantissa_bits & (1 << fmt.exponent_bits) - 1, code % steps
    sign = "−" if code >= 128 else ""
    shown = f"{'−' if math.copysign(1, value) < 0 else ''}{abs(value):.6g}"
    if exponent == 0:
        return f"{sign}2^(−{fmt.bias - 1}) · {mantissa}/{steps} = {shown}"
    return f"{sign}2^({exponent} − {fmt.bias}) · (1 + {mantissa}/{steps}) = {shown}"


def bits_picture(code: int) -> Figure:
    """The bits of a code in each format, colored by their part, with the value.

    Raises:
        ValueError: the code is not in 0 to 255.
    """
    drawing, axes = figure(8.6, 2.5)
    _draw(axes, code)
    return drawing


def _draw(axes: Axes, code: int) -> None:
    owners: list[str | None] = []
    for fmt in FORMATS.values():
        owners += ["sign", *["exponent"] * fmt.exponent_bits, *["mantissa"] * fmt.mantissa_bits]
    labels = [str(bit) for bit in bits_of(code)] * len(FORMATS)
    names = [fmt.name for fmt in FORMATS.values()]
    boxes(axes, owners, columns=8, labels=labels, colors=COLORS, row_labels=names, label_size=11)
    legend(axes, COLORS)
    style: Any = {"va": "center", "fontsize": 10, "fontfamily": "DejaVu Sans Mono"}
    for row, fmt in enumerate(FORMATS.values()):
        axes.text(8.4, row + 0.5, reading(code, fmt), **style)
    axes.text(8.4, -0.35, f"code 0x{code:02x} = {code}", fontweight="bold", **style)
    axes.set_xlim(-1.9, 16.5)


def fp8_bits(code: int = 0x38) -> ipywidgets.Widget:
    """The widget: a switch for each bit, and the picture of the byte.

    Args:
        code: the first byte.

    Raises:
        ValueError: the code is not in 0 to 255.
    """
    switches = [
        ipywidgets.ToggleButton(value=bool(bit), description=str(bit), tooltip=f"bit {place}", layout={"width": "44px"})
        for place, bit in zip(range(7, -1, -1), bits_of(code), strict=True)
    ]
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))

    def redraw(_: object = None) -> None:
        for switch in switches:
            switch.description = str(int(switch.value))
        picture.value = png(bits_picture(code_of([int(switch.value) for switch in switches])))

    for switch in switches:
        switch.observe(redraw, names="value")
    redraw()
    widget = ipywidgets.VBox([ipywidgets.HBox(switches), picture])
    widget.add_class("kvgather-fp8-bits")
    return widget
