"""Pictures of a small pool, byte by byte: the address of each (block, head, slot, dim), and the elements of a load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kvgather.formats.layout import PoolStrides, Which, byte_offset, pool_shape
from kvgather.workbook.figures import BAD, INK, PALETTE, boxes, figure, legend

__all__ = ["BLOCKS", "DIM", "HEADS", "PAGE", "Place", "locate", "page_bytes", "place_picture", "token_picture"]

# FP8: an element is a byte. A page of one block is 16 rows of 64 bytes in the pictures.
BLOCKS, PAGE, HEADS, DIM = 3, 16, 2, 32
PAGE_BYTES = PAGE * HEADS * DIM
LOAD = 16  # bytes that a thread loads at once
ROW = 64
WEAK = ("#CFE3F1", "#FAE3BC")  # bytes of the two heads
STRONG = (PALETTE[0], PALETTE[1])  # bytes of the selected token in its head


@dataclass(frozen=True)
class Place:
    """An element of the small pool, and its address.

    Attributes:
        layout, which: layout of the pool, and "key" or "value".
        block, head, slot, dim: indices of the element.
        byte: offset of the element from the pool's first byte.
        load: offset of the 16-byte load that contains it.
        together: (block, head, slot, dim) of the 16 elements of that load, in the order of addresses.
    """

    layout: str
    which: Which
    block: int
    head: int
    slot: int
    dim: int
    byte: int
    load: int
    together: tuple[tuple[int, int, int, int], ...]

    def __str__(self) -> str:
        element = (
            f"{self.which} of {self.layout}: block {self.block}, head {self.head}, slot {self.slot}, dim {self.dim}"
        )
        slots, dims = (sorted({place[axis] for place in self.together}) for axis in (2, 3))
        loaded = f"{_span('slot', slots)}, {_span('dim', dims)}"
        return f"{element} → byte {self.byte}; its load is bytes {self.load} to {self.load + LOAD - 1}: {loaded}"


def locate(layout: str, which: Which, block: int, head: int, slot: int, dim: int) -> Place:
    """Find an element of the small pool.

    Raises:
        ValueError: the layout is unknown, or an index is outside the pool.
    """
    shape = pool_shape(layout, which, BLOCKS, PAGE, HEADS, DIM, itemsize=1)
    pool = torch.empty(shape, dtype=torch.float8_e4m3fn)
    byte = byte_offset(pool, layout, which, block, head, slot, dim)
    load = byte - byte % LOAD
    together = _elements(layout, which)[load : load + LOAD]
    picked = tuple((int(b), int(h), int(s), int(d)) for b, h, s, d in together.tolist())
    return Place(layout, which, block, head, slot, dim, byte, load, picked)


def page_bytes(layout: str, which: Which, block: int) -> Tensor:
    """(head, slot, dim) of each byte of one block, in the order of addresses: int64 `[1024, 3]`."""
    return _elements(layout, which)[block * PAGE_BYTES : (block + 1) * PAGE_BYTES, 1:]


def token_picture(which: Which, head: int, slot: int, layouts: Sequence[str] = ("NHD", "HND", "SHUFFLE")) -> Figure:
    """The bytes of one token of one head in block 0, in each layout.

    Args:
        which: "key" or "value".
        head, slot: the head, and the slot of the token.
        layouts: layouts, with a panel each.
    """
    drawing, panels = figure(8.6, 2.35 * len(layouts) + 0.3, rows=len(layouts), squeeze=False)
    for axes, layout in zip(panels[:, 0], layouts, strict=True):
        _draw_page(axes, layout, which, 0, head, slot)
        axes.set_title(layout, pad=4)
    picked = f"slot {slot} of head {head}"
    others = {f"head {h}": WEAK[h] for h in range(HEADS)} | {picked: STRONG[head]}
    legend(panels[0, 0], others, loc="lower right", bbox_to_anchor=(1, 1))
    panels[-1, 0].set_xlabel("byte in its row of 64; on the left, the first byte of the row")
    return drawing


def place_picture(place: Place) -> Figure:
    """The block of an element with its 16-byte load outlined; below, that load and its two neighbours in detail."""
    drawing, (page, close) = figure(8.6, 4.5, rows=2, height_ratios=[16, 12])
    _draw_page(page, place.layout, place.which, place.block, place.head, place.slot)
    start = place.load - place.block * PAGE_BYTES
    row, column = divmod(start, ROW)
    page.add_patch(Rectangle((column, row), LOAD, 1, fill=False, edgecolor=INK, linewidth=2.0))
    cell = (place.byte - place.block * PAGE_BYTES) % ROW
    page.add_patch(Rectangle((cell, row), 1, 1, facecolor=BAD, edgecolor=INK, linewidth=0.8))
    page.set_title(f"block {place.block}: {place.which} in {place.layout}", pad=6)
    colors = {f"head {h}": WEAK[h] for h in range(HEADS)}
    colors |= {f"slot {place.slot} of head {place.head}": STRONG[place.head], "the element": BAD}
    legend(page, colors, loc="lower right", bbox_to_anchor=(1, 1))
    _draw_loads(close, place)
    return drawing


def _elements(layout: str, which: Which) -> Tensor:
    """(block, head, slot, dim) of every byte of the small pool, in the order of addresses: int64 `[bytes, 4]`."""
    pool = torch.empty(pool_shape(layout, which, BLOCKS, PAGE, HEADS, DIM, itemsize=1), dtype=torch.uint8)
    index = torch.cartesian_prod(*(torch.arange(size) for size in (BLOCKS, HEADS, PAGE, DIM)))
    offsets = PoolStrides.of(pool, layout, which).offset(*index.unbind(1))
    elements = torch.empty_like(index)
    elements[offsets] = index
    return elements


def _draw_page(axes: Axes, layout: str, which: Which, block: int, head: int, slot: int) -> None:
    heads, slots, _ = page_bytes(layout, which, block).unbind(1)
    shades = torch.tensor([to_rgb(color) for color in (*WEAK, *STRONG)])
    picked = (heads == head) & (slots == slot)
    image = shades[heads + HEADS * picked]
    # Every second token is darker, so that the tokens' ends are visible.
    image[(slots % 2 == 1) & ~picked] *= 0.93
    rows = PAGE_BYTES // ROW
    axes.imshow(image.view(rows, ROW, 3).numpy(), extent=(0, ROW, rows, 0), interpolation="nearest", aspect="equal")
    axes.vlines(range(LOAD, ROW, LOAD), 0, rows, color="white", linewidth=1.2)
    axes.set_yticks(
        [r + 0.5 for r in range(0, rows, 3)], [str(block * PAGE_BYTES + r * ROW) for r in range(0, rows, 3)]
    )
    axes.set_xticks([0, 16, 32, 48, 64])
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


def _draw_loads(axes: Axes, place: Place) -> None:
    """The load of the element between its two neighbours; every byte with its slot and dim."""
    elements = _elements(place.layout, place.which)
    first = min(max(place.load - LOAD, 0), len(elements) - 3 * LOAD)
    shown = elements[first : first + 3 * LOAD].tolist()
    owners, labels = [], []
    for number, (block, head, slot, dim) in enumerate(shown):
        same = (block, head, slot) == (place.block, place.head, place.slot)
        owners.append("element" if first + number == place.byte else f"strong{head}" if same else f"weak{head}")
        labels.append(f"slot {slot}\ndim {dim}")
    colors = {f"{kind}{h}": shade[h] for kind, shade in (("weak", WEAK), ("strong", STRONG)) for h in range(HEADS)}
    names = [f"bytes {first + r * LOAD}–{first + (r + 1) * LOAD - 1}" for r in range(3)]
    boxes(axes, owners, columns=LOAD, labels=labels, colors=colors | {"element": BAD}, row_labels=names, label_size=6.8)
    row = (place.load - first) // LOAD
    axes.add_patch(Rectangle((0, row), LOAD, 1, fill=False, edgecolor=INK, linewidth=2.0, zorder=3))
    axes.set_xlim(-3.3, LOAD + 0.1)
    axes.set_title("its 16-byte load (outlined), the one before and the one after", pad=6)


def _span(name: str, values: list[int]) -> str:
    return f"{name} {values[0]}" if len(values) == 1 else f"{name}s {values[0]} to {values[-1]}"
