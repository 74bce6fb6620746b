"""The page-tiled gather: one program moves a tile of one page, of K and of V, into dense rows.

The program takes its page from one record of a plan, or finds it in the offsets and the block table (`kernels.pages`),
checked where it is read: a bad id is never an address. Its addresses are built from the strides that the tensors have
(`kernels.address`); a per-tensor scale has none, so there is no stride to go wrong.
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
from ..formats.layout import Which
from ..formats.scale import Scale
from ..kernels.address import (
    PoolForm,
    block_offset,
    dim_offset,
    head_offset,
    pool_strides,
    scale_address,
    slot_offset,
)
from ..kernels.launch import PreparedLaunch, granule, inner_extent, prepared_once
from ..kernels.pages import PageSearch, find_page, load_record
from ..kernels.signatures import MOST, Pointers, signature
from ..kernels.values import round_to, widen
from .tile import Tile, TiledPool, choose_tile, unit_of


@triton.jit
def tile_of(program, POOL: tl.constexpr):
    """A program's record, the page offset of its tile's first slot, and the number of its tile among those of a slot.

    Neighbouring programs take neighbouring tiles of one page: its memory is read and written in one go.
    """
    tile_offset = (program % POOL.slot_tiles) * POOL.slots
    tile = (program % POOL.page_tiles) // POOL.slot_tiles
    return program // POOL.page_tiles, tile_offset, tile


@triton.jit
def load_tile(pool_ptr, block_id, tile_offset, tile, strides, POOL: tl.constexpr):
    """The elements of one tile of a page, `[slots, units, unit]`; of block 0 when block_id is −1.

    Lanes go along the last axis, and their next step should lead to the next element in memory: the next column, of
    the same head or another (NHD, V of SHUFFLE), or the next slot of the same head (HND, K of SHUFFLE). This order
    raised the bandwidth from 0.945 to 0.97 of a contiguous cast (H100).
    """
    SLOTS: tl.constexpr = POOL.slots
    UNITS: tl.constexpr = POOL.units
    UNIT: tl.constexpr = POOL.unit
    first_unit = tile * UNITS
    if POOL.across:  # [slots, units * unit]
        page_offset = tile_offset + tl.arange(0, SLOTS)
        column = first_unit * UNIT + tl.arange(0, UNITS * UNIT)
        present = (page_offset < POOL.page_size)[:, None] & (column < POOL.slot_units * UNIT)[None, :]
        if POOL.wide:
            page_offset = page_offset.to(tl.int64)
            column = column.to(tl.int64)
        outer = slot_offset(page_offset, strides, POOL)
        inner = head_offset(column // POOL.dim, strides, POOL)
        inner += dim_offset(column % POOL.dim, strides, POOL)
    else:  # [units, slots * unit]
        unit = first_unit + tl.arange(0, UNITS)
        along = tl.arange(0, SLOTS * UNIT)
        page_offset = tile_offset + along // UNIT
        present = (unit < POOL.slot_units)[:, None] & (page_offset < POOL.page_size)[None, :]
        if POOL.wide:
            unit = unit.to(tl.int64)
            page_offset = page_offset.to(tl.int64)
            along = along.to(tl.int64)
        outer = head_offset(unit // POOL.head_units, strides, POOL)
        outer += dim_offset(unit % POOL.head_units * UNIT, strides, POOL)
        inner = slot_offset(page_offset, strides, POOL)
        if POOL.dims_per_group > 1:  # `dim_offset(along % UNIT)`, in a form whose contiguity Triton recognizes
            group = along // POOL.dims_per_group % (UNIT // POOL.dims_per_group)
            inner += group * strides[4] * POOL.align + (along % POOL.dims_per_group) * strides[5]
        else:
            inner += dim_offset(along % UNIT, strides, POOL)
    address = pool_ptr + block_offset(tl.maximum(block_id, 0), strides, POOL) + (outer[:, None] + inner[None, :])
    whole: tl.constexpr = POOL.page_size % SLOTS == 0 and POOL.slot_units % UNITS == 0  # all inside, or all outside
    if whole and POOL.slot_units == UNITS * POOL.tiles:
        codes = tl.load(address)
    else:
        codes = tl.load(address, mask=first_unit < POOL.slot_units if whole else present, other=0)
    if POOL.across:
        return tl.reshape(codes, [SLOTS, UNITS, UNIT])
    else:
        return tl.permute(tl.reshape(codes, [UNITS, SLOTS, UNIT]), [1, 0, 2])


@triton.jit
def load_scale(scale_ptr, block_id, tile_offset, tile, strides, POOL: tl.constexpr):
    """The scale of one tile, `[slots or 1, units or 1, 1]`: 1 without a scale; NaN when block_id is −1."""
    if POOL.kind == "none":
        scale = tl.full([1, 1], 1.0, tl.float32)
    elif POOL.kind == "number":
        scale = tl.full([1, 1], 0.0, tl.float32) + scale_ptr
    elif POOL.kind == "per-tensor":
        scale = tl.load(scale_ptr + tl.zeros([1, 1], tl.int32))
    else:
        page_offset = (tile_offset + tl.arange(0, POOL.slots))[:, None].to(tl.int64)
        unit = (tile * POOL.units + tl.arange(0, POOL.units))[None, :].to(tl.int64)
        head = unit // POOL.head_units
        present = unit < POOL.slot_units
        if POOL.kind == "per-token-head":
            address = scale_address(scale_ptr, tl.maximum(block_id, 0), head, page_offset, strides)
            scale = tl.load(address, mask=present & (page_offset < POOL.page_size), other=1.0)
        else:  # per-head, or per-page-head
            address = scale_address(scale_ptr, tl.maximum(block_id, 0), head, 0, strides)
            scale = tl.load(address, mask=present, other=1.0)
    return tl.where(block_id < 0, float("nan"), scale)[:, :, None]


@triton.jit
def finish(
    codes, scale, block_id, dtype: tl.constexpr,
    POOL: tl.constexpr, CODE: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """The rows of a tile, `[slots, units * unit]`: codes times their scale, rounded; with `raw` the codes.

    When block_id is −1: NaN (by the scale, or as `nan_code`), or 0 if `zero_bad`.
    """
    if POOL.raw:
        values = tl.where(block_id < 0, 0 if POOL.zero_bad else POOL.nan_code, codes).to(dtype)
    else:
        values = widen(codes, CODE, HARDWARE) * scale
        if POOL.zero_bad:
            values = tl.where(block_id < 0, 0.0, values)
        values = round_to(values, dtype, BY_HAND)
    return tl.reshape(values, [codes.shape[0], codes.shape[1] * codes.shape[2]])


@triton.jit
def store_tile(out_ptr, values, page, tile_offset, tile, strides, POOL: tl.constexpr):
    """Store the tile's slots that belong to the page's record, one row of values `[slots, units * unit]` each."""
    _block_id, first_row, rows, first_offset = page
    stride_row, stride_head, stride_dim = strides
    page_offset = tile_offset + tl.arange(0, POOL.slots)
    column = tile * POOL.units * POOL.unit + tl.arange(0, POOL.units * POOL.unit)
    wanted = (page_offset >= first_offset) & (page_offset < first_offset + rows)
    mask = wanted[:, None] & (column < POOL.num_heads * POOL.dim)[None, :]
    if POOL.wide:
        page_offset = page_offset.to(tl.int64)
        column = column.to(tl.int64)
    column_offset = (column // POOL.dim) * stride_head * POOL.out_align + (column % POOL.dim) * stride_dim
    offset = (page_offset * stride_row * POOL.out_align)[:, None] + column_offset[None, :]
    page_ptr = out_ptr + (first_row - first_offset).to(tl.int64) * stride_row * POOL.out_align
    tl.store(page_ptr + offset, values, mask=mask)


@triton.jit
def gather_tile(
    k_ptrs, v_ptrs,  # pool, scale, rows
    page,  # block id or −1, first row, rows, page offset of the first row
    tile_offset, tile,
    k_strides, v_strides,  # of the pool, of the scale, of the rows
    K: tl.constexpr, V: tl.constexpr, CODE: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Move one tile of K and of V; all loads are issued before the first store.

    A tile past the last unit of K, or of V, moves nothing.
    """
    block_id = page[0]
    k_codes = load_tile(k_ptrs[0], block_id, tile_offset, tile, k_strides[0], K)
    v_codes = load_tile(v_ptrs[0], block_id, tile_offset, tile, v_strides[0], V)
    k_scale = load_scale(k_ptrs[1], block_id, tile_offset, tile, k_strides[1], K)
    v_scale = load_scale(v_ptrs[1], block_id, tile_offset, tile, v_strides[1], V)
    k = finish(k_codes, k_scale, block_id, k_ptrs[2].dtype.element_ty, K, CODE, HARDWARE, BY_HAND)
    v = finish(v_codes, v_scale, block_id, v_ptrs[2].dtype.element_ty, V, CODE, HARDWARE, BY_HAND)
    store_tile(k_ptrs[2], k, page, tile_offset, tile, k_strides[2], K)
    store_tile(v_ptrs[2], v, page, tile_offset, tile, v_strides[2], V)


@triton.jit(do_not_specialize=["batch", "columns", "num_blocks", "total", "row_stride", "column_stride"])
def gather_kernel(
    page_ptr,  # records, [records, 4] int32: block or −1, first row, rows, page offset of the first row
    cu_ptr, start_ptr,  # with PAGES page_ptr is the block table; [batch + 1] offsets, [batch] starts, int32 or int64
    k_ptr, k_scale_ptr, k_out_ptr,
    v_ptr, v_scale_ptr, v_out_ptr,
    batch, columns, num_blocks, total, row_stride, column_stride,
    cu_strides,  # of offsets, of starts
    k_strides, v_strides,  # block, head, slot group, slot, dim group, dim
    k_scale_strides, v_scale_strides,  # block, head, slot
    k_out_strides, v_out_strides,  # row, head, dim
    K: tl.constexpr, V: tl.constexpr,  # a `TiledPool` each
    CODE: tl.constexpr,  # the pools' `Fp8Format`; None: floats
    HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
    PAGES: tl.constexpr,  # a `PageSearch`; None: pages come from records
):  # fmt: skip
    """Gather one tile of one page, of K and of V:

        out[row, head, dim] = pool[block_id, head, page_offset, dim] · scale[block_id, head, page_offset]

    for the rows of the page's record that are in the tile. A bad block id gives NaN, in V 0 with `zero_bad`.

    Source: the function, not its code, is that of `cp_mha_gather_cache` in vLLM's AITER backend, which has one program
    for each (token, head) (`lab.before_fix`). Chapter 07 leads from there to this tile in measured steps.
    """
    record, tile_offset, tile = tile_of(tl.program_id(0), K)
    if PAGES is None:
        block_id, first_row, rows, page_offset = load_record(page_ptr, record)
    else:
        strides = (row_stride.to(tl.int64), column_stride.to(tl.int64), cu_strides[0], cu_strides[1])
        block_id, first_row, rows, page_offset, _sequence, _column, _id = find_page(
            record, (page_ptr, cu_ptr, start_ptr), (batch, columns, num_blocks, total), strides, PAGES
        )
    if (tile_offset >= page_offset + rows) | (tile_offset + K.slots <= page_offset):  # an unused record has no rows
        return
    gather_tile(
        (k_ptr, k_scale_ptr, k_out_ptr), (v_ptr, v_scale_ptr, v_out_ptr),
        (block_id, first_row, rows, page_offset), tile_offset, tile,
        (k_strides, k_scale_strides, k_out_strides), (v_strides, v_scale_strides, v_out_strides),
        K, V, CODE, HARDWARE, BY_HAND,
    )  # fmt: skip


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_NAN_BITS = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}


@dataclass(frozen=True)
class Side:
    """K's or V's part of a launch: its pool, its scale, and the rows that it becomes."""

    which: Which
    pool: Tensor
    scale: Scale
    out: Tensor

    @property
    def raw(self) -> bool:
        """Whether codes are copied without a change."""
        return self.scale.kind == "none" and self.out.dtype == self.pool.dtype

    @property
    def kind(self) -> str:
        """The scale's kind, as the kernel distinguishes kinds."""
        if self.scale.number is not None:
            return "number"
        return "per-head" if self.scale.kind == "per-page-head" else self.scale.kind  # they differ in a stride alone

    def across(self, layout: str) -> bool:
        """Whether a tile's lanes go across heads: the heads of a slot are one run of memory."""
        return layout == "NHD" or (layout == "SHUFFLE" and self.which == "value")

    def form(self, layout: str) -> PoolForm:
        """What kernels are compiled for of the pool."""
        return PoolForm.of(self.pool, layout, self.which, self.kind)

    @property
    def views(self) -> tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]:
        """The dtypes that the kernel loads the pool and the scale as, and stores the rows as."""
        bits = _BITS[self.pool.element_size()]
        loaded = bits if self.raw or self.pool.dtype in FORMATS else None
        stands_in = self.scale.kind == "none"  # the pool, for a scale that is never read
        return loaded, (loaded if stands_in else None), (bits if self.raw else None)


def _tiled_pools(
    sides: tuple[Side, Side], layout: str, forms: tuple[PoolForm, PoolForm], tile: Tile, zero_bad_v: bool
) -> tuple[TiledPool, TiledPool]:
    """What the kernel is compiled for of K and of V, whose pools have `forms`."""
    units = tile.k_units, tile.v_units
    rows = [inner_extent(side.out) + forms[0].page_size * side.out.stride(0) for side in sides]
    wide = any(form.wide for form in forms) or max(rows) >= 2**31
    tiles = max(
        triton.cdiv(form.num_heads * form.dim // unit_of(form.dim), n) for form, n in zip(forms, units, strict=True)
    )
    out_align = granule([n for side in sides for n in side.out.stride()[:2]], sides[0].out.element_size())
    dtype = sides[0].pool.dtype
    nan_code = FORMATS[dtype].nan_code if dtype in FORMATS else _NAN_BITS[dtype]
    k, v = (
        TiledPool(
            **(vars(form) | {"wide": wide}), slots=tile.slots, units=n, tiles=tiles, across=side.across(layout),
            raw=side.raw, nan_code=nan_code, zero_bad=zero_bad_v and side.which == "value", out_align=out_align,
        )
        for side, form, n in zip(sides, forms, units, strict=True)
    )  # fmt: skip
    return k, v


def _strides_of(
    sides: tuple[Side, Side], layout: str, forms: tuple[TiledPool, TiledPool], offsets: tuple[Tensor | None, ...]
) -> tuple[tuple[int, ...], ...]:
    """The kernel's stride tuples, in its order; 0 for offsets that it does not read."""
    align = forms[0].out_align
    cu_strides = tuple(0 if tensor is None else tensor.stride(0) for tensor in offsets)
    pools = [pool_strides(side.pool, layout, side.which, form) for side, form in zip(sides, forms, strict=True)]
    scales = [side.scale.strides for side in sides]
    outs = [(row // align, head // align, dim) for row, head, dim in (side.out.stride() for side in sides)]
    return (cu_strides, *pools, *scales, *outs)


class GatherLaunch:
    """The gather of one cache into rows of one kind: all that its launches share.

    Attributes:
        page_size: slots of a page.
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
        fmt = FORMATS.get(k.pool.dtype)
        forms = k.form(layout), v.form(layout)
        tile = choose_tile(
            forms[0].page_size, forms[0].num_heads, forms[0].dim, forms[1].dim, k.pool.element_size(), lanes
        )
        if offsets is not None and layout == "SHUFFLE":
            # A program waits for offsets and table in turn. With twice as many resident programs they wait together:
            # 21.1 to 20.9 µs for 16,384 tokens of 8 heads of 64, and 144.8 to 146.0 for 131,072 (H100).
            tile = replace(tile, num_warps=min(tile.num_warps, 8))
        tiled = _tiled_pools((k, v), layout, forms, tile, zero_bad_v)
        self.page_size, self.page_tiles = tiled[0].page_size, tiled[0].page_tiles
        self.constants: dict[str, Any] = {
            "K": tiled[0],
            "V": tiled[1],
            "CODE": fmt,
            "HARDWARE": not interpreted and (fmt is None or fp8_support(k.pool.device)[k.pool.dtype] == "hardware"),
            "BY_HAND": interpreted,
            "PAGES": None if offsets is None else PageSearch.of(self.page_size, *offsets),
            "num_warps": tile.num_warps,
        }
        self.strides = _strides_of((k, v), layout, tiled, offsets or (None, None))
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
        records = -(-total // self.page_size) + 2 * batch
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
