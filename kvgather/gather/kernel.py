"""The page-tiled gather: one program moves a tile of one page, of K and of V, into dense rows.

The program reads one record of the plan and never the block table. Its addresses are built from the strides the
tensors have; a per-tensor scale has none, so there is no stride to go wrong. Inside a page offsets are 32-bit, across
pages and rows they are 64-bit.

A tile is `[SLOTS, UNITS, UNIT]`: UNIT is the largest power of two that divides head_dim, so that head dims such as 80
and 192 waste no lanes, and a unit is a head's dim range of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import fp8_support, interpreting
from ..formats.fp8 import FORMATS
from ..formats.layout import Which, as_nhd
from ..formats.scale import Scale
from ..kernels.launch import LoadStrides, granule, inner_extent, launching
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
def _load_tile(
    pool_ptr, block, slot0, unit0,
    stride_block, stride_head, stride_slot_group, stride_slot, stride_dim_group, stride_dim,
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
def _load_scale(
    scale_ptr, block, slot0, unit0, stride_block, stride_head, stride_slot,
    PAGE: tl.constexpr, UNITS_PER_HEAD: tl.constexpr, HEADS: tl.constexpr,
    SLOTS: tl.constexpr, UNITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The scale of one tile, `[SLOTS or 1, UNITS or 1, 1]`, 1 where there is none; NaN when block is −1."""
    if KIND == "none":
        scale = tl.full([1, 1], 1.0, tl.float32)
    elif KIND == "per-tensor":
        scale = tl.load(scale_ptr + tl.zeros([1, 1], tl.int32))
    else:
        slot = (slot0 + tl.arange(0, SLOTS))[:, None].to(tl.int64)
        unit = (unit0 + tl.arange(0, UNITS))[None, :].to(tl.int64)
        page_ptr = scale_ptr + tl.maximum(block, 0) * stride_block + (unit // UNITS_PER_HEAD) * stride_head
        present = unit < HEADS * UNITS_PER_HEAD
        if KIND == "per-token-head":
            scale = tl.load(page_ptr + slot * stride_slot, mask=present & (slot < PAGE), other=1.0)
        else:  # per-head, or per-page-head
            scale = tl.load(page_ptr, mask=present, other=1.0)
    return tl.where(block < 0, float("nan"), scale)[:, :, None]


@triton.jit
def _finish(
    held, scale, block, OUT_DTYPE: tl.constexpr, RAW: tl.constexpr, NAN_CODE: tl.constexpr,
    FORMAT: tl.constexpr, BIAS: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """What is stored, `[SLOTS, UNITS * UNIT]`: the scaled value rounded, or the bits as they are."""
    if RAW:
        values = tl.where(block < 0, NAN_CODE, held).to(OUT_DTYPE)
    else:
        values = round_to(widen(held, FORMAT, BIAS, HARDWARE) * scale, OUT_DTYPE, BY_HAND)
    return tl.reshape(values, [held.shape[0], held.shape[1] * held.shape[2]])


@triton.jit
def _store_tile(
    out_ptr, values, first_row, rows, begin, slot0, unit0,
    stride_row, stride_head, stride_dim,
    DIM: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the tile's slots that belong to the record, one row of values `[SLOTS, UNITS * UNIT]` each."""
    slot = slot0 + tl.arange(0, SLOTS)
    column = unit0 * UNIT + tl.arange(0, UNITS * UNIT)
    mask = ((slot >= begin) & (slot < begin + rows))[:, None] & (column < HEADS * DIM)[None, :]
    if WIDE:
        slot = slot.to(tl.int64)
        column = column.to(tl.int64)
    column_offset = (column // DIM) * stride_head * ALIGN + (column % DIM) * stride_dim
    offset = (slot * stride_row * ALIGN)[:, None] + column_offset[None, :]
    page_ptr = out_ptr + (first_row - begin).to(tl.int64) * stride_row * ALIGN
    tl.store(page_ptr + offset, values, mask=mask)


@triton.jit
def gather_kernel(
    record_ptr,  # [records, 4] int32: block or -1, first row, rows, offset of the first row in the page
    k_ptr, k_scale_ptr, k_out_ptr,
    v_ptr, v_scale_ptr, v_out_ptr,
    stride_k_block, stride_k_head, stride_k_slot_group, stride_k_slot, stride_k_dim_group, stride_k_dim,
    stride_v_block, stride_v_head, stride_v_slot_group, stride_v_slot, stride_v_dim_group, stride_v_dim,
    stride_k_scale_block, stride_k_scale_head, stride_k_scale_slot,
    stride_v_scale_block, stride_v_scale_head, stride_v_scale_slot,
    stride_k_out_row, stride_k_out_head, stride_k_out_dim,
    stride_v_out_row, stride_v_out_head, stride_v_out_dim,
    PAGE: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    SLOTS: tl.constexpr, K_UNITS: tl.constexpr, K_UNIT: tl.constexpr, V_UNITS: tl.constexpr, V_UNIT: tl.constexpr,
    TILES: tl.constexpr, PAGE_TILES: tl.constexpr,
    V_SLOTS_PER_GROUP: tl.constexpr, K_DIMS_PER_GROUP: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    K_ACROSS: tl.constexpr, V_ACROSS: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    FORMAT: tl.constexpr, BIAS: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
    K_RAW: tl.constexpr, V_RAW: tl.constexpr, NAN_CODE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take neighbouring tiles of one page, so that a page is read and written in one go.
    program = tl.program_id(0)
    slot0 = (program % (PAGE_TILES // TILES)) * SLOTS
    tile = (program % PAGE_TILES) // (PAGE_TILES // TILES)
    record_ptr += (program // PAGE_TILES).to(tl.int64) * 4
    block = tl.load(record_ptr).to(tl.int64)
    first_row = tl.load(record_ptr + 1)
    rows = tl.load(record_ptr + 2)
    begin = tl.load(record_ptr + 3)
    if (slot0 >= begin + rows) | (slot0 + SLOTS <= begin):  # an unused record has no rows
        return
    # All loads are issued before the first store. A tile past the last unit of K, or of V, moves nothing.
    k_held = _load_tile(
        k_ptr, block, slot0, tile * K_UNITS,
        stride_k_block, stride_k_head, stride_k_slot_group, stride_k_slot, stride_k_dim_group, stride_k_dim,
        PAGE, K_DIM, HEADS, SLOTS, K_UNITS, K_UNIT, TILES, 1, K_DIMS_PER_GROUP, K_ALIGN, K_ACROSS,
        FORMAT != "" or K_RAW, WIDE,
    )  # fmt: skip
    v_held = _load_tile(
        v_ptr, block, slot0, tile * V_UNITS,
        stride_v_block, stride_v_head, stride_v_slot_group, stride_v_slot, stride_v_dim_group, stride_v_dim,
        PAGE, V_DIM, HEADS, SLOTS, V_UNITS, V_UNIT, TILES, V_SLOTS_PER_GROUP, 1, V_ALIGN, V_ACROSS,
        FORMAT != "" or V_RAW, WIDE,
    )  # fmt: skip
    k_scale = _load_scale(
        k_scale_ptr, block, slot0, tile * K_UNITS, stride_k_scale_block, stride_k_scale_head, stride_k_scale_slot,
        PAGE, K_DIM // K_UNIT, HEADS, SLOTS, K_UNITS, K_KIND,
    )  # fmt: skip
    v_scale = _load_scale(
        v_scale_ptr, block, slot0, tile * V_UNITS, stride_v_scale_block, stride_v_scale_head, stride_v_scale_slot,
        PAGE, V_DIM // V_UNIT, HEADS, SLOTS, V_UNITS, V_KIND,
    )  # fmt: skip
    k = _finish(
        k_held, k_scale, block, k_out_ptr.dtype.element_ty, K_RAW, NAN_CODE, FORMAT, BIAS, HARDWARE, BY_HAND
    )  # fmt: skip
    v = _finish(
        v_held, v_scale, block, v_out_ptr.dtype.element_ty, V_RAW, NAN_CODE, FORMAT, BIAS, HARDWARE, BY_HAND
    )  # fmt: skip
    _store_tile(
        k_out_ptr, k, first_row, rows, begin, slot0, tile * K_UNITS,
        stride_k_out_row, stride_k_out_head, stride_k_out_dim, K_DIM, HEADS, SLOTS, K_UNITS, K_UNIT, OUT_ALIGN, WIDE,
    )  # fmt: skip
    _store_tile(
        v_out_ptr, v, first_row, rows, begin, slot0, tile * V_UNITS,
        stride_v_out_row, stride_v_out_head, stride_v_out_dim, V_DIM, HEADS, SLOTS, V_UNITS, V_UNIT, OUT_ALIGN, WIDE,
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
class _Side:
    """K's or V's part of a launch: where it is read from, what it is multiplied by, where it goes."""

    which: Which
    pool: Tensor
    scale: Scale
    out: Tensor

    @property
    def raw(self) -> bool:
        return self.scale.kind == "none" and self.out.dtype == self.pool.dtype

    def signature(self) -> tuple[object, ...]:
        """Everything that `_prepare` reads; two launches with equal signatures differ in their addresses alone."""
        scale = self.scale
        return (
            self.pool.shape, self.pool.stride(), self.out.shape[1:], self.out.stride(), self.out.dtype,
            scale.kind, scale.stride_block, scale.stride_head, scale.stride_slot,
        )  # fmt: skip

    def pointers(self, records: Tensor, itemsize: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = records if self.scale.tensor is None else self.scale.tensor  # without a scale it is never read
        if not self.raw:
            return self.pool, scale, self.out
        return self.pool.view(_BITS[itemsize]), scale, self.out.view(_BITS[itemsize])


@dataclass(frozen=True)
class _Prepared:
    """What a launch needs besides addresses."""

    strides: tuple[int, ...]
    page_tiles: int
    constants: dict[str, Any]


_PREPARED: dict[object, _Prepared] = {}


def _prepare(k: _Side, v: _Side, layout: str, dtype: torch.dtype, interpreted: bool, lanes: int) -> _Prepared:
    fmt = FORMATS.get(dtype)
    page_size, num_heads, k_dim = as_nhd(k.pool[:0], layout, "key").shape[1:]
    v_dim = v.out.shape[2]
    tile = choose_tile(page_size, num_heads, k_dim, v_dim, dtype.itemsize, lanes)
    k_unit, v_unit = _unit(k_dim), _unit(v_dim)
    tiles = max(
        triton.cdiv(num_heads * k_dim // k_unit, tile.k_units),
        triton.cdiv(num_heads * v_dim // v_unit, tile.v_units),
    )
    page_tiles = tiles * triton.cdiv(page_size, tile.slots)
    pools: list[LoadStrides] = []
    scale_strides: list[int] = []
    widest = 0
    for side in (k, v):
        pool, scale = LoadStrides.of(side.pool, layout, side.which), side.scale
        pools.append(pool)
        scale_strides += [scale.stride_block, scale.stride_head, scale.stride_slot]
        widest = max(
            widest,
            pool.extent,
            inner_extent(side.out) + page_size * side.out.stride(0),
            num_heads * scale.stride_head + page_size * scale.stride_slot,
        )
    out_align = granule([n for side in (k, v) for n in side.out.stride()[:2]], k.out.element_size())
    constants = {
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
        "PAGE_TILES": page_tiles,
        "V_SLOTS_PER_GROUP": pools[1].slots_per_group,
        "K_DIMS_PER_GROUP": pools[0].dims_per_group,
        "K_ALIGN": pools[0].align,
        "V_ALIGN": pools[1].align,
        "OUT_ALIGN": out_align,
        "K_ACROSS": layout == "NHD",
        "V_ACROSS": layout != "HND",
        "K_KIND": _kernel_kind(k.scale),
        "V_KIND": _kernel_kind(v.scale),
        "FORMAT": "" if fmt is None else fmt.name,
        "BIAS": 0 if fmt is None else fmt.bias,
        "HARDWARE": not interpreted and (fmt is None or fp8_support(k.pool.device)[dtype] == "hardware"),
        "BY_HAND": interpreted,
        "K_RAW": k.raw,
        "V_RAW": v.raw,
        "NAN_CODE": _NAN_BITS[dtype] if fmt is None else fmt.nan_code,
        "WIDE": widest >= 2**31,
        "num_warps": tile.num_warps,
    }
    out_strides: list[int] = []
    for row, head, dim in (k.out.stride(), v.out.stride()):
        out_strides += [row // out_align, head // out_align, dim]
    return _Prepared((*pools[0].strides, *pools[1].strides, *scale_strides, *out_strides), page_tiles, constants)


def _kernel_kind(scale: Scale) -> str:
    return "per-head" if scale.kind == "per-page-head" else scale.kind  # they differ in stride_block alone


def launch(
    key_cache: Tensor,
    value_cache: Tensor,
    layout: str,
    dtype: torch.dtype,
    k_scale: Scale,
    v_scale: Scale,
    records: Tensor,
    k_out: Tensor,
    v_out: Tensor,
) -> None:
    """Launch the kernel; everything was checked by the caller.

    Args:
        key_cache, value_cache: pools in `layout`, any strides, at least one block; FP8 as uint8.
        dtype: what the pools hold, an FP8 dtype where they came as uint8.
        k_scale, v_scale: resolved scales.
        records: `[n, 4]` int32 of a `GatherPlan`.
        k_out, v_out: `[rows, heads, dim]`, any strides, one float dtype; uint8 to copy FP8 codes as they are.
    """
    if len(records) == 0:
        return
    k, v = _Side("key", key_cache, k_scale, k_out), _Side("value", value_cache, v_scale, v_out)
    interpreted = interpreting()
    key = (layout, dtype, interpreted, key_cache.device, k.signature(), v.signature())
    prepared = _PREPARED.get(key)
    if prepared is None:
        if len(_PREPARED) >= 1024:
            _PREPARED.clear()
        lanes = 32 if interpreted else torch.cuda.get_device_properties(key_cache.device).warp_size
        prepared = _PREPARED[key] = _prepare(k, v, layout, dtype, interpreted, lanes)
    pointers = (*k.pointers(records, dtype.itemsize), *v.pointers(records, dtype.itemsize))
    with launching(key_cache, interpreted):
        gather_kernel[(len(records) * prepared.page_tiles,)](
            records, *pointers, *prepared.strides, **prepared.constants
        )
