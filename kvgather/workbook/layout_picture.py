"""Pictures of a pool, byte by byte: the address of each (block, head, page_offset, dim), and the elements of a load."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kvgather.formats.layout import PoolStrides, Which, byte_offset, pool_shape
from kvgather.workbook.figures import BAD, INK, PALETTE, boxes, figure, legend

__all__ = ["Place", "PoolSizes", "locate", "page_bytes", "place_picture", "token_picture"]

LOAD = 16  # bytes that a thread loads at once
LARGEST_PAGE = 16_384  # bytes of a block in a picture
# Bytes of the selected token, by head; without the color of the selected element. Seven heads and more repeat colors.
STRONG = tuple(color for color in PALETTE if color != BAD)
# Bytes of the other tokens: the same colors, mixed with white.
WEAK = tuple(
    to_hex((1 - 0.22 * (1 - red), 1 - 0.22 * (1 - green), 1 - 0.22 * (1 - blue)))
    for red, green, blue in map(to_rgb, STRONG)
)


@dataclass(frozen=True)
class PoolSizes:
    """Sizes of a pool in FP8, where an element is a byte.

    Attributes:
        blocks, page, heads, dim: blocks of the pool, tokens of a block, heads, and head_dim.

    Raises:
        ValueError: page or dim is not a multiple of 16, which SHUFFLE requires, or a block is too large to draw.
    """

    blocks: int = 3
    page: int = 16
    heads: int = 2
    dim: int = 32

    def __post_init__(self) -> None:
        for name, size, multiple in (
            ("blocks", self.blocks, 1),
            ("page", self.page, LOAD),
            ("heads", self.heads, 1),
            ("dim", self.dim, LOAD),
        ):
            if size < 1 or size % multiple:
                raise ValueError(f"{name} is {size}; accepted: positive multiples of {multiple}")
        if self.page_bytes > LARGEST_PAGE:
            raise ValueError(f"a block has {self.page_bytes} bytes; accepted for a picture: up to {LARGEST_PAGE}")

    @property
    def page_bytes(self) -> int:
        """Bytes of one block, all heads."""
        return self.page * self.heads * self.dim

    @property
    def row(self) -> int:
        """Bytes in a row of the picture of a block: 64, or more for a block of more than 64 such rows."""
        row = 64
        while self.page_bytes > 64 * row:
            row *= 2
        return row

    @property
    def rows(self) -> int:
        """Rows of the picture of a block."""
        return -(-self.page_bytes // self.row)


SMALL = PoolSizes()


@dataclass(frozen=True)
class Place:
    """An element of a pool, and its address.

    Attributes:
        layout, which: layout of the pool, and "key" or "value".
        block, head, page_offset, dim: indices of the element.
        byte: offset of the element from the pool's first byte.
        load: offset of the 16-byte load that contains it.
        together: (block, head, page_offset, dim) of the 16 elements of that load, in the order of addresses.
        sizes: sizes of the pool.
    """

    layout: str
    which: Which
    block: int
    head: int
    page_offset: int
    dim: int
    byte: int
    load: int
    together: tuple[tuple[int, int, int, int], ...]
    sizes: PoolSizes = SMALL

    def __str__(self) -> str:
        where = f"block {self.block}, head {self.head}, page_offset {self.page_offset}, dim {self.dim}"
        offsets, dims = (sorted({place[axis] for place in self.together}) for axis in (2, 3))
        loaded = f"{_span('page_offset', offsets)}, {_span('dim', dims)}"
        load = f"bytes {self.load} to {self.load + LOAD - 1}"
        return f"{self.which} of {self.layout}: {where} → byte {self.byte}; its load is {load}: {loaded}"


def locate(
    layout: str, which: Which, block: int, head: int, page_offset: int, dim: int, sizes: PoolSizes = SMALL
) -> Place:
    """Find an element of a pool.

    Args:
        layout, which: layout of the pool, and "key" or "value".
        block, head, page_offset, dim: indices of the element.
        sizes: sizes of the pool.

    Raises:
        ValueError: the layout is unknown, or an index is outside the pool.
    """
    if not 0 <= page_offset < sizes.page:
        raise ValueError(f"page_offset is {page_offset}; accepted: 0 to {sizes.page - 1}")
    pool = _pool(layout, which, sizes)
    byte = byte_offset(pool, layout, which, block, head, page_offset, dim)
    load = byte - byte % LOAD
    together = _elements(layout, which, sizes)[load : load + LOAD]
    picked = tuple((int(b), int(h), int(o), int(d)) for b, h, o, d in together.tolist())
    return Place(layout, which, block, head, page_offset, dim, byte, load, picked, sizes)


def page_bytes(layout: str, which: Which, block: int, sizes: PoolSizes = SMALL) -> Tensor:
    """(head, page_offset, dim) of each byte of one block, in the order of addresses: int64 `[page_bytes, 3]`."""
    return _elements(layout, which, sizes)[block * sizes.page_bytes : (block + 1) * sizes.page_bytes, 1:]


def token_picture(
    which: Which,
    head: int,
    page_offset: int,
    layouts: Sequence[str] = ("NHD", "HND", "SHUFFLE"),
    sizes: PoolSizes = SMALL,
) -> Figure:
    """The bytes of one token of one head in block 0, in each layout.

    Args:
        which: "key" or "value".
        head, page_offset: the head, and the token's place in the block.
        layouts: layouts, with a panel each.
        sizes: sizes of the pool.
    """
    height = 0.3 + len(layouts) * (0.55 + _height(sizes))
    drawing, panels = figure(8.6, height, rows=len(layouts), squeeze=False)
    for axes, layout in zip(panels[:, 0], layouts, strict=True):
        _draw_page(axes, layout, which, 0, head, page_offset, sizes)
        axes.set_title(layout, pad=4)
    legend(panels[0, 0], _names(head, page_offset, sizes), **_legend_place(sizes))
    panels[-1, 0].set_xlabel(f"byte in its row of {sizes.row}; on the left, the first byte of the row")
    return drawing


def place_picture(place: Place) -> Figure:
    """The block of an element with its 16-byte load outlined; below, that load and its two neighbours in detail."""
    sizes = place.sizes
    width, height = 8.6, 2.6 + _height(sizes)
    drawing, (page, close) = figure(width, height, rows=2)
    # In inches, and not by the layout engine: a widget redraws this picture, and laying out takes a fifth of the time.
    drawing.set_layout_engine("none")
    for axes, (left, bottom, right, top) in (
        (page, (0.65, 2.1, 8.45, 2.1 + _height(sizes))),
        (close, (0.1, 0.1, 8.5, 1.45)),
    ):
        axes.set_position((left / width, bottom / height, (right - left) / width, (top - bottom) / height))
    _draw_page(page, place.layout, place.which, place.block, place.head, place.page_offset, sizes)
    start = place.load - place.block * sizes.page_bytes
    row, column = divmod(start, sizes.row)
    page.add_patch(Rectangle((column, row), LOAD, 1, fill=False, edgecolor=INK, linewidth=2.0))
    cell = (place.byte - place.block * sizes.page_bytes) % sizes.row
    page.add_patch(Rectangle((cell, row), 1, 1, facecolor=BAD, edgecolor=INK, linewidth=0.8))
    page.set_title(f"block {place.block}: {place.which} in {place.layout}", pad=6)
    colors = _names(place.head, place.page_offset, sizes) | {"the element": BAD}
    legend(page, colors, **_legend_place(sizes))
    _draw_loads(close, place)
    return drawing


def _pool(layout: str, which: Which, sizes: PoolSizes) -> Tensor:
    shape = pool_shape(layout, which, sizes.blocks, sizes.page, sizes.heads, sizes.dim, itemsize=1)
    return torch.empty(shape, dtype=torch.float8_e4m3fn)


@functools.lru_cache(16)
def _elements(layout: str, which: Which, sizes: PoolSizes) -> Tensor:
    """(block, head, page_offset, dim) of every byte of the pool, in the order of addresses: int64 `[bytes, 4]`."""
    index = torch.cartesian_prod(*(torch.arange(n) for n in (sizes.blocks, sizes.heads, sizes.page, sizes.dim)))
    offsets = PoolStrides.of(_pool(layout, which, sizes), layout, which).offset(*index.unbind(1))
    elements = torch.empty_like(index)
    elements[offsets] = index
    return elements


def _height(sizes: PoolSizes) -> float:
    """Inches for the picture of a block that is 8 inches wide."""
    return max(0.5, 7.2 * sizes.rows / sizes.row)


def _names(head: int, page_offset: int, sizes: PoolSizes) -> dict[str, str]:
    """The legend of a block: the color of each of the first heads, and of the selected token."""
    names = {f"head {h}": WEAK[h] for h in range(min(sizes.heads, 4))}
    return names | {f"page_offset {page_offset} of head {head}": STRONG[head % len(STRONG)]}


def _legend_place(sizes: PoolSizes) -> dict[str, Any]:
    """Above the picture, on the right of its title; smaller for more heads."""
    tight = {"fontsize": 7.0, "columnspacing": 1.0, "handletextpad": 0.4} if sizes.heads > 2 else {}
    return {"loc": "lower right", "bbox_to_anchor": (1, 1), **tight}


def _draw_page(
    axes: Axes, layout: str, which: Which, block: int, head: int, page_offset: int, sizes: PoolSizes
) -> None:
    # With NumPy: torch's threads would wait for the browser's, 30 ms a redraw on two cores.
    heads, offsets, _ = page_bytes(layout, which, block, sizes).numpy().T
    shades = np.array([to_rgb(color) for color in (*WEAK, *STRONG)])
    picked = (heads == head) & (offsets == page_offset)
    rows, row = sizes.rows, sizes.row
    image = np.ones((rows * row, 3))
    image[: len(heads)] = shades[heads % len(WEAK) + len(WEAK) * picked]
    # Every second token is darker, so that the tokens' ends are visible.
    image[: len(heads)][(offsets % 2 == 1) & ~picked] *= 0.93
    axes.imshow(image.reshape(rows, row, 3), extent=(0, row, rows, 0), interpolation="nearest", aspect="equal")
    axes.vlines(range(LOAD, row, LOAD), 0, rows, color="white", linewidth=1.2)
    ticks = range(0, rows, 3 * max(1, rows // 16))
    axes.set_yticks([r + 0.5 for r in ticks], [str(block * sizes.page_bytes + r * row) for r in ticks])
    axes.set_xticks(range(0, row + 1, row // 4))
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


def _draw_loads(axes: Axes, place: Place) -> None:
    """The load of the element between its two neighbours; every byte with its page_offset and dim."""
    elements = _elements(place.layout, place.which, place.sizes)
    first = min(max(place.load - LOAD, 0), max(len(elements) - 3 * LOAD, 0))
    shown = elements[first : first + 3 * LOAD].tolist()
    owners, labels = [], []
    for number, (block, head, page_offset, dim) in enumerate(shown):
        same = (block, head, page_offset) == (place.block, place.head, place.page_offset)
        kind = f"strong{head}" if same else f"weak{head}"
        owners.append("element" if first + number == place.byte else kind)
        labels.append(f"{page_offset}, {dim}")
    colors = {f"weak{h}": WEAK[h % len(WEAK)] for h in range(place.sizes.heads)} | {"element": BAD}
    colors |= {f"strong{h}": STRONG[h % len(STRONG)] for h in range(place.sizes.heads)}
    names = [f"bytes {at}–{at + LOAD - 1}" for at in range(first, first + len(shown), LOAD)]
    boxes(axes, owners, columns=LOAD, labels=labels, colors=colors, row_labels=names, label_size=7.0)
    row = (place.load - first) // LOAD
    axes.add_patch(Rectangle((0, row), LOAD, 1, fill=False, edgecolor=INK, linewidth=2.0, zorder=3))
    axes.set_xlim(-3.3, LOAD + 0.1)
    axes.set_title("its 16-byte load (outlined), and its two neighbours: page_offset, dim of each byte", pad=6)


def _span(name: str, values: list[int]) -> str:
    return f"{name} {values[0]}" if len(values) == 1 else f"{name}s {values[0]} to {values[-1]}"
