"""The gather that trusts the block table: the same tiles, and no records between the table and the addresses.

It says what the checked records cost. With a bad id in its table it reads outside the pool, so it stays here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..gather.kernel import _finish, _load_scale, _load_tile, _prepare, _Side, _store_tile, launching
from ..gather.ops import as_operand
from .cases import Built
from .runner import Call


@triton.jit
def trusting_kernel(
    table_ptr,  # [batch, columns] int32
    cu_seqlens_ptr,  # [batch + 1] int32
    stride_table,
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
        k_out_ptr, k, first_row, rows, 0, slot0, tile * K_UNITS,
        stride_k_out_row, stride_k_out_head, stride_k_out_dim, K_DIM, HEADS, SLOTS, K_UNITS, K_UNIT, OUT_ALIGN, WIDE,
    )  # fmt: skip
    _store_tile(
        v_out_ptr, v, first_row, rows, 0, slot0, tile * V_UNITS,
        stride_v_out_row, stride_v_out_head, stride_v_out_dim, V_DIM, HEADS, SLOTS, V_UNITS, V_UNIT, OUT_ALIGN, WIDE,
    )  # fmt: skip


def trusting(built: Built, out: tuple[Tensor, Tensor]) -> Call:
    """The same tiles from the block table as it is; sequences that begin at 0, and nothing is checked."""
    case, cache, interpreted = built.case, built.cache, interpreting()
    k_scale, v_scale = cache._scales
    k = _Side("key", as_operand(cache.key_cache), k_scale, out[0])
    v = _Side("value", as_operand(cache.value_cache), v_scale, out[1])
    lanes = 32 if interpreted else torch.cuda.get_device_properties(out[0].device).warp_size
    prepared = _prepare(k, v, case.layout, case.dtype, interpreted, lanes)
    table, offsets = built.block_table, built.cu_seqlens_k
    pointers = (*k.pointers(table, case.dtype.itemsize), *v.pointers(table, case.dtype.itemsize))
    grid = (triton.cdiv(max(case.lengths), case.page_size) * prepared.page_tiles, len(case.lengths))

    def run() -> None:
        with launching(table, interpreted):
            trusting_kernel[grid](
                table, offsets, table.stride(0), *pointers, *prepared.strides, **prepared.constants
            )  # fmt: skip

    return run
