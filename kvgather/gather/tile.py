"""How the gather is cut into tiles, and what its kernel is compiled for of a pool and the tile of it.

A tile is `[slots, units, unit]`: a unit is a range of `unit` dims of one head, where `unit` is the largest power of two
that divides head_dim, so that head dims such as 80 and 192 waste no lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from ..kernels.address import PoolForm

MAX_UNIT = 128


@dataclass(frozen=True)
class TiledPool(PoolForm):
    """K's or V's pool, the tile of it that one program moves, and the rows it becomes: one `tl.constexpr`.

    `wide` also covers the offsets of a page's rows.

    Attributes:
        slots: slots of a tile.
        units: units of a tile.
        tiles: tiles that cover the heads of a slot, of K and of V.
        across: whether neighbouring lanes go across heads (NHD, V of SHUFFLE), or along the slots of a head.
        raw: whether codes are copied as they are.
        nan_code: the bits of NaN in the pool's dtype.
        zero_bad: whether the rows of a bad block id are 0; else they are NaN.
        out_align: what the strides of rows and their heads are divided by.
    """

    slots: int
    units: int
    tiles: int
    across: bool
    raw: bool
    nan_code: int
    zero_bad: bool
    out_align: int

    @property
    def unit(self) -> int:
        """Dims of a unit."""
        return unit_of(self.dim)

    @property
    def head_units(self) -> int:
        """Units of a head."""
        return self.dim // self.unit

    @property
    def slot_units(self) -> int:
        """Units of a slot, of all heads."""
        return self.num_heads * self.head_units

    @property
    def slot_tiles(self) -> int:
        """Tiles that cover the slots of a page."""
        return -(-self.page_size // self.slots)

    @property
    def page_tiles(self) -> int:
        """Tiles of a page, each moved by one program."""
        return self.tiles * self.slot_tiles


@dataclass(frozen=True)
class Tile:
    """How the work is cut: a program moves `slots` slots of `k_units` units of K and `v_units` units of V."""

    slots: int
    k_units: int
    v_units: int
    num_warps: int


def unit_of(dim: int) -> int:
    """The largest power of two that divides `dim`, at most `MAX_UNIT`."""
    return min(dim & -dim, MAX_UNIT)


def choose_tile(page_size: int, num_heads: int, k_dim: int, v_dim: int, itemsize: int, lanes: int = 32) -> Tile:
    """The tile for a geometry, by shape alone; no result depends on it.

    16 slots are the 16 bytes that V of SHUFFLE keeps together, and in every layout a tile of 16 slots and 512 columns
    (8 heads of 64) was the fastest or within 1 % of it on an H100; so were 16 elements for each of a warp's `lanes`.
    """
    slots = min(triton.next_power_of_2(page_size), 16)
    columns = max(64, 512 // max(1, itemsize // 2))
    heads = max(1, min(triton.next_power_of_2(num_heads), columns // triton.next_power_of_2(max(k_dim, v_dim))))
    k_units, v_units = (
        min(triton.next_power_of_2(n * dim // unit_of(dim)) for n in (num_heads, heads)) for dim in (k_dim, v_dim)
    )
    elements = slots * k_units * unit_of(k_dim)
    return Tile(slots, k_units, v_units, num_warps=max(1, min(16, elements // (16 * lanes))))
