"""Variants of our gather's launch, with the same tiles: an empty kernel, a software decode, and an unchecked gather.

The unchecked gather reads the block table instead of checked records, so its time shows the cost of the records. A bad
block id makes it read outside the pool: it is for benchmarks only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..cases import Built
from ..device import interpreting
from ..gather.kernel import Side, finish, gather_kernel, load_scale, load_tile, pointers_of, prepare, store_tile
from ..kernels.launch import launching
from .runner import Call


@triton.jit
def empty_kernel(out_ptr):
    pass


@triton.jit
def trusting_kernel(
    table_ptr,  # [batch, columns] int32
    cu_seqlens_ptr,  # [batch + 1] int32
    stride_table,
    k_ptr, k_scale_ptr, k_out_ptr,
    v_ptr, v_scale_ptr, v_out_ptr,
    k_strides, v_strides, k_scale_strides, v_scale_strides, k_out_strides, v_out_strides,
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
    program = tl.program_id(0)
    sequence = tl.program_id(1)
    slot0 = (program % (PAGE_TILES // TILES)) * SLOTS
    tile = (program % PAGE_TILES) // (PAGE_TILES // TILES)
    column = program // PAGE_TILES
    first_row = tl.load(cu_seqlens_ptr + sequence) + column * PAGE
    rows = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1) - first_row, PAGE)
    if slot0 >= rows:
        return
    block = tl.load(table_ptr + sequence * stride_table + column).to(tl.int64)
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
        k_out_ptr, k, first_row, rows, 0, slot0, tile * K_UNITS, k_out_strides,
        K_DIM, HEADS, SLOTS, K_UNITS, K_UNIT, OUT_ALIGN, WIDE,
    )  # fmt: skip
    store_tile(
        v_out_ptr, v, first_row, rows, 0, slot0, tile * V_UNITS, v_out_strides,
        V_DIM, HEADS, SLOTS, V_UNITS, V_UNIT, OUT_ALIGN, WIDE,
    )  # fmt: skip


class _Launch:
    """The launch of our gather on a case: its tensors, strides, constants and grid, for the variants."""

    def __init__(self, built: Built, out: tuple[Tensor, Tensor]) -> None:
        case, cache, self.interpreted = built.case, built.cache, interpreting()
        k_scale, v_scale = cache.scales
        k = Side("key", cache.key_cache, k_scale, out[0])
        v = Side("value", cache.value_cache, v_scale, out[1])
        self.records = built.plan.records
        pairs = zip(pointers_of(k, v), (*k.views, *v.views), strict=True)
        self.pointers = [p if view is None else p.view(view) for p, view in pairs]  # type: ignore[union-attr]
        self.launch = prepare(k, v, case.layout)
        self.programs = len(self.records) * self.launch.page_tiles

    def run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        with launching(self.records, self.interpreted):
            kernel[grid](*arguments, **constants)


def empty_launch(built: Built, out: tuple[Tensor, Tensor]) -> Call:
    """An empty kernel with the programs and warps of our gather."""
    ours = _Launch(built, out)
    warps = ours.launch.constants["num_warps"]
    return partial(ours.run, empty_kernel, (ours.programs,), ours.records, num_warps=warps)


def software_decode(built: Built, out: tuple[Tensor, Tensor]) -> Call:
    """Our gather as compiled for hardware that cannot decode the pool's format."""
    ours = _Launch(built, out)
    constants = ours.launch.constants | {"HARDWARE": False}
    numbers = (0, 0, 0, 0, 0, 0)
    arguments = (*(ours.records,) * 3, *ours.pointers, *numbers, *ours.launch.strides)
    return partial(ours.run, gather_kernel, (ours.programs,), *arguments, **constants)


def trusting(built: Built, out: tuple[Tensor, Tensor]) -> Call:
    """The same tiles, found in the block table without a check; sequences begin at position 0."""
    ours, case, table = _Launch(built, out), built.case, built.block_table
    grid = (triton.cdiv(max(case.lengths), case.page_size) * ours.launch.page_tiles, len(case.lengths))
    arguments = (table, built.cu_seqlens_k, table.stride(0), *ours.pointers, *ours.launch.strides[1:])
    return partial(ours.run, trusting_kernel, grid, *arguments, **ours.launch.constants)
