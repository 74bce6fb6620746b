"""The page-tiled gather: one program moves a tile of one page, of K and of V, into dense rows.

The program takes its page from one record of a plan, or finds it in the offsets and the block table (`kernels.pages`),
checked where it is read: a bad id is never an address. Its addresses are built from the strides the
tensors have; a per-tensor scale has none, so there is no stride to go wrong. Inside a page offsets are 32-bit, across
pages and rows they are 64-bit.

A tile is `[SLOTS, UNITS, UNIT]`: UNIT is the largest power of two that divides head_dim, so that head dims such as 80
and 192 waste no lanes, and a unit is a head's dim range of that size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import fp8_support, interpreting
from ..formats.fp8 import FORMATS
from ..formats.layout import Which, as_nhd
from ..formats.scale import Scale
from ..kernels.launch import LoadStrides, PreparedLaunch, granule, inner_extent, prepared_once
from ..kernels.pages import find_page
from ..kernels.signatures import MOST, Pointers, offset_lanes, signature
from ..kernels.values import round_to, widen


@triton.jit
def _slot_offset(slot, stride_slot_group, stride_slot, SLOTS_PER_GROUP: tl.constexpr, ALIGN: tl.constexpr):
    if SLOTS_PER_GROUP > 1:  # V of SHUFFLE
        return (slot // SLOTS_PER_GROUP) * stride_slot_group * ALIGN + (slot % SLOTS_PER_GROUP) * stride_slot
    else:
        return slot * stride_slot_group * ALIGN


@triton.jit
def _dim_offset(
    dim, stride_dim_group, stride_dim,
    SLOTS_PER_GROUP: tl.constexpr, DIMS_PER_GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    if DIMS_PER_GROUP > 1:  # K of SHUFFLE
        return (dim // DIMS_PER_GROUP) * stride_dim_group * ALIGN + (dim % DIMS_PER_GROUP) * stride_dim
    elif SLOTS_PER_GROUP > 1:
        return dim * stride_dim_group * ALIGN
    else:
        return dim * stride_dim_group


@triton.jit
def load_tile(
    pool_ptr, block, slot0, unit0, strides,
    PAGE: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr,
    SLOTS: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr, TILES: tl.constexpr,
    SLOTS_PER_GROUP: tl.constexpr, DIMS_PER_GROUP: tl.constexpr, ALIGN: tl.constexpr, ACROSS: tl.constexpr,
    INTEGER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the pool holds in one tile of a page, `[SLOTS, UNITS, UNIT]`; of page 0 when block is −1.

    Strides come divided by ALIGN: their product is a multiple of it that Triton can see, and loads that widely. Lanes
    go along the last axis, and their next step should lead to what lies next in memory: the next column, of the same
    head or another (NHD, V of SHUFFLE), or the next slot of the same head (HND, K of SHUFFLE). That made 0.97 of
    0.945 of a cast's bandwidth on an H100.
    """
    units: tl.constexpr = HEADS * (DIM // UNIT)
    stride_block, stride_head, stride_slot_group, stride_slot, stride_dim_group, stride_dim = strides
    if ACROSS:  # [SLOTS, UNITS * UNIT]
        slot = slot0 + tl.arange(0, SLOTS)
        column = unit0 * UNIT + tl.arange(0, UNITS * UNIT)
        present = (slot < PAGE)[:, None] & (column < units * UNIT)[None, :]
        if WIDE:
            slot = slot.to(tl.int64)
            column = column.to(tl.int64)
        outer = _slot_offset(slot, stride_slot_group, stride_slot, SLOTS_PER_GROUP, ALIGN)
        inner = (column // DIM) * stride_head * ALIGN
        inner += _dim_offset(column % DIM, stride_dim_group, stride_dim, SLOTS_PER_GROUP, DIMS_PER_GROUP, ALIGN)
    else:  # [UNITS, SLOTS * UNIT]
        unit = unit0 + tl.arange(0, UNITS)
        along = tl.arange(0, SLOTS * UNIT)
        slot = slot0 + along // UNIT
        present = (unit < units)[:, None] & (slot < PAGE)[None, :]
        if WIDE:
            unit = unit.to(tl.int64)
            slot = slot.to(tl.int64)
            along = along.to(tl.int64)
        first_dim = unit % (DIM // UNIT) * UNIT
        outer = (unit // (DIM // UNIT)) * stride_head * ALIGN
        outer += _dim_offset(first_dim, stride_dim_group, stride_dim, SLOTS_PER_GROUP, DIMS_PER_GROUP, ALIGN)
        inner = _slot_offset(slot, stride_slot_group, stride_slot, SLOTS_PER_GROUP, ALIGN)
        if DIMS_PER_GROUP > 1:  # the same, in a form of which Triton sees what is contiguous
            group = along // DIMS_PER_GROUP % (UNIT // DIMS_PER_GROUP)
            inner += group * stride_dim_group * ALIGN + (along % DIMS_PER_GROUP) * stride_dim
        else:
            inner += _dim_offset(along % UNIT, stride_dim_group, stride_dim, SLOTS_PER_GROUP, DIMS_PER_GROUP, ALIGN)
    address = pool_ptr + tl.maximum(block, 0) * stride_block * ALIGN + (outer[:, None] + inner[None, :])
    whole: tl.constexpr = PAGE % SLOTS == 0 and units % UNITS == 0  # every tile is all inside, or all outside
    if whole and units == UNITS * TILES:
        held = tl.load(address)
    elif INTEGER:
        held = tl.load(address, mask=unit0 < units if whole else present, other=0)
    else:
        held = tl.load(address, mask=unit0 < units if whole else present, other=0.0)
    if ACROSS:
        return tl.reshape(held, [SLOTS, UNITS, UNIT])
    else:
        return tl.permute(tl.reshape(held, [UNITS, SLOTS, UNIT]), [1, 0, 2])


@triton.jit
def load_scale(
    scale_ptr, block, slot0, unit0, strides,
    PAGE: tl.constexpr, UNITS_PER_HEAD: tl.constexpr, HEADS: tl.constexpr,
    SLOTS: tl.constexpr, UNITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The scale of one tile, `[SLOTS or 1, UNITS or 1, 1]`, 1 where there is none; NaN when block is −1."""
    if KIND == "none":
        scale = tl.full([1, 1], 1.0, tl.float32)
    elif KIND == "number":
        scale = tl.full([1, 1], 0.0, tl.float32) + scale_ptr
    elif KIND == "per-tensor":
        scale = tl.load(scale_ptr + tl.zeros([1, 1], tl.int32))
    else:
        slot = (slot0 + tl.arange(0, SLOTS))[:, None].to(tl.int64)
        unit = (unit0 + tl.arange(0, UNITS))[None, :].to(tl.int64)
        page_ptr = scale_ptr + tl.maximum(block, 0) * strides[0] + (unit // UNITS_PER_HEAD) * strides[1]
        present = unit < HEADS * UNITS_PER_HEAD
        if KIND == "per-token-head":
            scale = tl.load(page_ptr + slot * strides[2], mask=present & (slot < PAGE), other=1.0)
        else:  # per-head, or per-page-head
            scale = tl.load(page_ptr, mask=present, other=1.0)
    return tl.where(block < 0, float("nan"), scale)[:, :, None]


@triton.jit
def finish(
    held, scale, block, OUT_DTYPE: tl.constexpr, RAW: tl.constexpr, NAN_CODE: tl.constexpr, ZERO_BAD: tl.constexpr,
    CODE: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """What is stored, `[SLOTS, UNITS * UNIT]`: the scaled value rounded, or the bits as they are.

    When block is −1: NaN (by the scale, or as NAN_CODE), or 0 if ZERO_BAD.
    """
    if RAW:
        values = tl.where(block < 0, 0 if ZERO_BAD else NAN_CODE, held).to(OUT_DTYPE)
    else:
        values = widen(held, CODE, HARDWARE) * scale
        if ZERO_BAD:
            values = tl.where(block < 0, 0.0, values)
        values = round_to(values, OUT_DTYPE, BY_HAND)
    return tl.reshape(values, [held.shape[0], held.shape[1] * held.shape[2]])


@triton.jit
def store_tile(
    out_ptr, values, first_row, rows, begin, slot0, unit0, strides,
    DIM: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the tile's slots that belong to the record, one row of values `[SLOTS, UNITS * UNIT]` each."""
    slot = slot0 + tl.arange(0, SLOTS)
    column = unit0 * UNIT + tl.arange(0, UNITS * UNIT)
    mask = ((slot >= begin) & (slot < begin + rows))[:, None] & (column < HEADS * DIM)[None, :]
    stride_row, stride_head, stride_dim = strides
    if WIDE:
        slot = slot.to(tl.int64)
        column = column.to(tl.int64)
    column_offset = (column // DIM) * stride_head * ALIGN + (column % DIM) * stride_dim
    offset = (slot * stride_row * ALIGN)[:, None] + column_offset[None, :]
    page_ptr = out_ptr + (first_row - begin).to(tl.int64) * stride_row * ALIGN
    tl.store(page_ptr + offset, values, mask=mask)


@triton.jit(do_not_specialize=["batch", "columns", "num_blocks", "total", "row_stride", "column_stride"])
def gather_kernel(
    page_ptr,  # PLANNED: records, [records, 4] int32: block or −1, first row, rows, offset of the first row in the page
    cu_ptr, start_ptr,  # else page_ptr is the block table, with [batch + 1] offsets and [batch] starts, int32 or int64
    k_ptr, k_scale_ptr, k_out_ptr,
    v_ptr, v_scale_ptr, v_out_ptr,
    batch, columns, num_blocks, total, row_stride, column_stride,
    cu_strides,
    k_strides, v_strides,  # block, head, slot group, slot, dim group, dim
    k_scale_strides, v_scale_strides,  # block, head, slot
    k_out_strides, v_out_strides,  # row, head, dim
    PAGE: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    SLOTS: tl.constexpr, K_UNITS: tl.constexpr, K_UNIT: tl.constexpr, V_UNITS: tl.constexpr, V_UNIT: tl.constexpr,
    TILES: tl.constexpr, PAGE_TILES: tl.constexpr,
    V_SLOTS_PER_GROUP: tl.constexpr, K_DIMS_PER_GROUP: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    K_ACROSS: tl.constexpr, V_ACROSS: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    CODE: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
    K_RAW: tl.constexpr, V_RAW: tl.constexpr, NAN_CODE: tl.constexpr, ZERO_BAD_V: tl.constexpr, WIDE: tl.constexpr,
    PLANNED: tl.constexpr, STARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out[row, head] = pool[block, head, slot] * scale[block, head, slot], of K and of V, for one tile of a page.

    Neighbouring programs take neighbouring tiles of one page, so that a page is read and written in one go.
    """
    program = tl.program_id(0)
    slot0 = (program % (PAGE_TILES // TILES)) * SLOTS
    tile = (program % PAGE_TILES) // (PAGE_TILES // TILES)
    record = program // PAGE_TILES
    if PLANNED:
        record_ptr = page_ptr + record.to(tl.int64) * 4
        block = tl.load(record_ptr).to(tl.int64)
        first_row = tl.load(record_ptr + 1)
        rows = tl.load(record_ptr + 2)
        begin = tl.load(record_ptr + 3)
    else:
        strides = (row_stride.to(tl.int64), column_stride.to(tl.int64), cu_strides[0], cu_strides[1])
        block, first_row, rows, begin, _sequence, _column, _id = find_page(
            record, page_ptr, cu_ptr, start_ptr, batch, columns, num_blocks, total, strides, PAGE, STARTS, LANES
        )
    if (slot0 >= begin + rows) | (slot0 + SLOTS <= begin):  # an unused record has no rows
        return
    # All loads are issued before the first store. A tile past the last unit of K, or of V, moves nothing.
    k_codes = load_tile(
        k_ptr, block, slot0, tile * K_UNITS, k_strides,
        PAGE, K_DIM, HEADS, SLOTS, K_UNITS, K_UNIT, TILES, 1, K_DIMS_PER_GROUP, K_ALIGN, K_ACROSS,
        CODE is not None or K_RAW, WIDE,
    )  # fmt: skip
    v_codes = load_tile(
        v_ptr, block, slot0, tile * V_UNITS, v_strides,
        PAGE, V_DIM, HEADS, SLOTS, V_UNITS, V_UNIT, TILES, V_SLOTS_PER_GROUP, 1, V_ALIGN, V_ACROSS,
        CODE is not None or V_RAW, WIDE,
    )  # fmt: skip
    k_scale = load_scale(
        k_scale_ptr, block, slot0, tile * K_UNITS, k_scale_strides,
        PAGE, K_DIM // K_UNIT, HEADS, SLOTS, K_UNITS, K_KIND,
    )  # fmt: skip
    v_scale = load_scale(
        v_scale_ptr, block, slot0, tile * V_UNITS, v_scale_strides,
        PAGE, V_DIM // V_UNIT, HEADS, SLOTS, V_UNITS, V_KIND,
    )  # fmt: skip
    k = finish(
        k_codes, k_scale, block, k_out_ptr.dtype.element_ty, K_RAW, NAN_CODE, False, CODE, HARDWARE, BY_HAND
    )  # fmt: skip
    v = finish(
        v_codes, v_scale, block, v_out_ptr.dtype.element_ty, V_RAW, NAN_CODE, ZERO_BAD_V, CODE, HARDWARE,
        BY_HAND,
    )  # fmt: skip
    store_tile(
        k_out_ptr, k, first_row, rows, begin, slot0, tile * K_UNITS, k_out_strides,
        K_DIM, HEADS, SLOTS, K_UNITS, K_UNIT, OUT_ALIGN, WIDE,
    )  # fmt: skip
    store_tile(
        v_out_ptr, v, first_row, rows, begin, slot0, tile * V_UNITS, v_out_strides,
        V_DIM, HEADS, SLOTS, V_UNITS, V_UNIT, OUT_ALIGN, WIDE,
    )  # fmt: skip


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_NAN_BITS = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}


@dataclass(frozen=True)
class Tile:
    """How the work is cut: a program moves `slots` slots of `k_units` units of K and `v_units` units of V."""

    slots: int
    k_units: int
    v_units: int
    num_warps: int


def _unit(dim: int) -> int:
    """The largest power of two that divides dim, 128 at most."""
    return min(dim & -dim, 128)


def choose_tile(page_size: int, num_heads: int, k_dim: int, v_dim: int, itemsize: int, lanes: int = 32) -> Tile:
    """The tile for a geometry, by shape alone; no result depends on it.

    16 slots are the 16 bytes that V of SHUFFLE keeps together, and in every layout a tile of 16 slots and 512 columns
    (8 heads of 64) was the fastest or within 1 % of it on an H100; so were 16 elements for each of a warp's `lanes`.
    """
    slots = min(triton.next_power_of_2(page_size), 16)
    columns = max(64, 512 // max(1, itemsize // 2))
    heads = max(1, min(triton.next_power_of_2(num_heads), columns // triton.next_power_of_2(max(k_dim, v_dim))))
    k_units, v_units = (
        min(triton.next_power_of_2(n * dim // _unit(dim)) for n in (num_heads, heads)) for dim in (k_dim, v_dim)
    )
    elements = slots * k_units * _unit(k_dim)
    return Tile(slots, k_units, v_units, num_warps=max(1, min(16, elements // (16 * lanes))))


@dataclass(frozen=True)
class Side:
    """K's or V's part of a launch: where it is read from, what it is multiplied by, where it goes."""

    which: Which
    pool: Tensor
    scale: Scale
    out: Tensor

    @property
    def raw(self) -> bool:
        """Whether codes are copied as they are."""
        return self.scale.kind == "none" and self.out.dtype == self.pool.dtype

    @property
    def kind(self) -> str:
        """The scale's kind as the kernel tells them apart."""
        if self.scale.number is not None:
            return "number"
        return "per-head" if self.scale.kind == "per-page-head" else self.scale.kind  # they differ in a stride alone

    @property
    def views(self) -> tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]:
        """The dtypes that the kernel loads the pool and the scale as, and stores the rows as."""
        bits = _BITS[self.pool.element_size()]
        loaded = bits if self.raw or self.pool.dtype in FORMATS else None
        stands_in = self.scale.kind == "none"  # the pool, for a scale that is never read
        return loaded, (loaded if stands_in else None), (bits if self.raw else None)


class GatherLaunch:
    """The gather of one cache into rows of one kind: all that its launches share.

    Attributes:
        page_tiles: programs for each record.
        strides, constants: as the kernel takes them.
    """

    def __init__(
        self,
        k: Side,
        v: Side,
        layout: str,
        *,
        interpreted: bool,
        lanes: int,
        offsets: tuple[Tensor, Tensor | None] | None = None,
        zero_bad_v: bool = False,
    ) -> None:
        """Prepare the launches, of checked arguments.

        Args:
            k, v: pools in `layout`, resolved scales, and rows of one float dtype, or of the pool's to copy codes.
            layout: "NHD", "HND" or "SHUFFLE".
            interpreted: whether kernels run in Triton's interpreter.
            lanes: of a warp.
            offsets: cu_seqlens and starts of the batch, when pages are found in the block table; None: from records.
            zero_bad_v: whether V's rows of a bad block id are 0; K's are NaN.
        """
        dtype = k.pool.dtype
        fmt = FORMATS.get(dtype)
        page_size, num_heads, k_dim = as_nhd(k.pool[:0], layout, "key").shape[1:]
        v_dim = v.out.shape[2]
        tile = choose_tile(page_size, num_heads, k_dim, v_dim, dtype.itemsize, lanes)
        if offsets is not None and layout == "SHUFFLE":
            # A program waits for offsets and table in turn. With twice as many resident programs they wait together:
            # 21.1 to 20.9 µs for 16,384 tokens of 8 heads of 64, and 144.8 to 146.0 for 131,072 (H100).
            tile = replace(tile, num_warps=min(tile.num_warps, 8))
        k_unit, v_unit = _unit(k_dim), _unit(v_dim)
        tiles = max(
            triton.cdiv(num_heads * k_dim // k_unit, tile.k_units),
            triton.cdiv(num_heads * v_dim // v_unit, tile.v_units),
        )
        self.page_tiles = tiles * triton.cdiv(page_size, tile.slots)
        pools = [LoadStrides.of(side.pool, layout, side.which) for side in (k, v)]
        widest = max(
            max(
                pool.extent,
                inner_extent(side.out) + page_size * side.out.stride(0),
                num_heads * side.scale.stride_head + page_size * side.scale.stride_slot,
            )
            for side, pool in zip((k, v), pools, strict=True)
        )
        out_align = granule([n for side in (k, v) for n in side.out.stride()[:2]], k.out.element_size())
        self.constants: dict[str, Any] = {
            "PAGE": page_size,
            "HEADS": num_heads,
            "K_DIM": k_dim,
            "V_DIM": v_dim,
            "SLOTS": tile.slots,
            "K_UNITS": tile.k_units,
            "K_UNIT": k_unit,
            "V_UNITS": tile.v_units,
            "V_UNIT": v_unit,
            "TILES": tiles,
            "PAGE_TILES": self.page_tiles,
            "V_SLOTS_PER_GROUP": pools[1].slots_per_group,
            "K_DIMS_PER_GROUP": pools[0].dims_per_group,
            "K_ALIGN": pools[0].align,
            "V_ALIGN": pools[1].align,
            "OUT_ALIGN": out_align,
            "K_ACROSS": layout == "NHD",
            "V_ACROSS": layout != "HND",
            "K_KIND": k.kind,
            "V_KIND": v.kind,
            "CODE": fmt,
            "HARDWARE": not interpreted and (fmt is None or fp8_support(k.pool.device)[dtype] == "hardware"),
            "BY_HAND": interpreted,
            "K_RAW": k.raw,
            "V_RAW": v.raw,
            "NAN_CODE": _NAN_BITS[dtype] if fmt is None else fmt.nan_code,
            "ZERO_BAD_V": zero_bad_v,
            "WIDE": widest >= 2**31,
            "PLANNED": offsets is None,
            "STARTS": offsets is not None and offsets[1] is not None,
            "LANES": 32 if offsets is None else offset_lanes(len(offsets[0]) - 1),
            "num_warps": tile.num_warps,
        }
        scales = [(side.scale.stride_block, side.scale.stride_head, side.scale.stride_slot) for side in (k, v)]
        outs = [(row // out_align, head // out_align, dim) for row, head, dim in (k.out.stride(), v.out.stride())]
        given = offsets or (None, None)
        cu_strides = tuple(0 if tensor is None else tensor.stride(0) for tensor in given)
        self.strides = (cu_strides, *(pool.strides for pool in pools), *scales, *outs)
        views = (None, None, None, *k.views, *v.views)
        self._launch = PreparedLaunch(gather_kernel, views, self.strides, self.constants, interpreted)

    def from_records(self, records: Tensor, tensors: Pointers, addresses: tuple[int | float, ...]) -> None:
        """Gather what a plan's records name.

        Args:
            records: `[n, 4]` int32 of a `GatherPlan`.
            tensors: K's pool, scale and rows, then V's; what a scale is not read from may be anything.
            addresses: of those.
        """
        at = records.data_ptr()
        numbers = (0, 0, 0, 0, 0, 0)
        self._launch(
            records.shape[0] * self.page_tiles, (records, records, records, *tensors), (at, at, at, *addresses), numbers
        )

    def from_table(
        self,
        table: Tensor,
        cu_seqlens: Tensor,
        starts: Tensor | None,
        num_blocks: int,
        total: int,
        tensors: Pointers,
        addresses: tuple[int | float, ...],
    ) -> None:
        """Gather a batch's tokens by its block table, checked where it is read; see `kernels.pages`.

        Args:
            table: `[batch, columns]` int32 or int64, any strides.
            cu_seqlens, starts: `[batch + 1]` and `[batch]`, int32 or int64; starts None is 0.
            num_blocks: ids must be below it.
            total: tokens at most.
            tensors, addresses: as in `from_records`.
        """
        batch, columns = table.shape
        if batch == 0 or total == 0:
            return
        page_size = self.constants["PAGE"]
        records = -(-total // page_size) + 2 * batch
        given = cu_seqlens if starts is None else starts
        numbers = (batch, min(columns, MOST), num_blocks, total, *table.stride())
        self._launch(
            records * self.page_tiles, (table, cu_seqlens, given, *tensors),
            (table.data_ptr(), cu_seqlens.data_ptr(), given.data_ptr(), *addresses), numbers,
        )  # fmt: skip


def prepare(
    k: Side, v: Side, layout: str, offsets: tuple[Tensor, Tensor | None] | None = None, zero_bad_v: bool = False
) -> GatherLaunch:
    """`GatherLaunch` for this machine; arguments as there."""
    interpreted = interpreting()
    lanes = 32 if interpreted else torch.cuda.get_device_properties(k.pool.device).warp_size
    return GatherLaunch(k, v, layout, interpreted=interpreted, lanes=lanes, offsets=offsets, zero_bad_v=zero_bad_v)


def pointers_of(k: Side, v: Side) -> Pointers:
    """K's pool, scale and rows, then V's; the pool stands in for a scale that is never read."""
    pointers: list[Tensor | float] = []
    for side in (k, v):
        tensor, number = side.scale.tensor, side.scale.number
        pointers += [side.pool, number if number is not None else side.pool if tensor is None else tensor, side.out]
    return tuple(pointers)


def addresses_of(pointers: Pointers) -> tuple[int | float, ...]:
    """The addresses of tensors; numbers as they are."""
    return tuple(p.data_ptr() if isinstance(p, Tensor) else p for p in pointers)


def launch(
    key_cache: Tensor,
    value_cache: Tensor,
    layout: str,
    k_scale: Scale,
    v_scale: Scale,
    records: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    zero_bad_v: bool,
) -> None:
    """Gather what a plan's records name; everything was checked by the caller.

    Args:
        key_cache, value_cache: pools in `layout`, any strides, at least one block.
        k_scale, v_scale: resolved scales.
        records: `[n, 4]` int32 of a `GatherPlan`.
        k_out, v_out: `[rows, heads, dim]`, any strides, one float dtype; the pools', or uint8, to copy codes.
        zero_bad_v: whether V's rows of a bad block id are 0; K's are NaN.
    """
    dtype = key_cache.dtype
    if k_out.dtype == torch.uint8:
        k_out, v_out = k_out.view(dtype), v_out.view(dtype)
    k, v = Side("key", key_cache, k_scale, k_out), Side("value", value_cache, v_scale, v_out)
    pointers = pointers_of(k, v)
    key = (
        layout, interpreting(), k.kind, v.kind, zero_bad_v,
        *(signature(p) if isinstance(p, Tensor) else None for p in pointers),
    )  # fmt: skip
    prepared_once(gather_kernel, key, lambda: prepare(k, v, layout, zero_bad_v=zero_bad_v)).from_records(
        records, pointers, addresses_of(pointers)
    )
