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
from ..gather.kernel import Side, gather_kernel, gather_tile, pointers_of, prepare, tile_of
from ..kernels.launch import launching
from .runner import Call


@triton.jit
def empty_kernel(out_ptr):
    """Nothing: the time of a launch with so many programs and warps."""


@triton.jit
def trusting_kernel(
    table_ptr,  # [batch, columns] int32
    cu_seqlens_ptr,  # [batch + 1] int32
    stride_table,
    k_ptr, k_scale_ptr, k_out_ptr,
    v_ptr, v_scale_ptr, v_out_ptr,
    k_strides, v_strides, k_scale_strides, v_scale_strides, k_out_strides, v_out_strides,
    K: tl.constexpr, V: tl.constexpr, CODE: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    """`gather_kernel` with its page from the block table, unchecked: block_id = table[sequence, page].

    Sequences begin at position 0. One program for each tile of a page (axis 0) and sequence (axis 1).
    """
    page, tile_offset, tile = tile_of(tl.program_id(0), K)
    sequence = tl.program_id(1)
    first_row = tl.load(cu_seqlens_ptr + sequence) + page * K.page_size
    rows = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1) - first_row, K.page_size)
    if tile_offset >= rows:
        return
    block_id = tl.load(table_ptr + sequence * stride_table + page).to(tl.int64)
    gather_tile(
        (k_ptr, k_scale_ptr, k_out_ptr), (v_ptr, v_scale_ptr, v_out_ptr), (block_id, first_row, rows, 0),
        tile_offset, tile,
        (k_strides, k_scale_strides, k_out_strides), (v_strides, v_scale_strides, v_out_strides),
        K, V, CODE, HARDWARE, BY_HAND,
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
    """`trusting_kernel` on a case: the same tiles, from the block table without a check."""
    ours, case, table = _Launch(built, out), built.case, built.block_table
    grid = (triton.cdiv(max(case.lengths), case.page_size) * ours.launch.page_tiles, len(case.lengths))
    arguments = (table, built.cu_seqlens_k, table.stride(0), *ours.pointers, *ours.launch.strides[1:])
    return partial(ours.run, trusting_kernel, grid, *arguments, **ours.launch.constants)
