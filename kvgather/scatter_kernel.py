"""The kernel that writes new tokens into a paged cache: one program for one token and a group of heads."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import interpreting
from .formats.fp8 import FORMATS, SCALE_FLOOR, code_max
from .formats.layout import Geometry, PoolStrides, Which
from .formats.scale import Scale
from .kernels.launch import launching
from .kernels.values import round_to


@triton.jit
def encode_fp8(
    values,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX: tl.constexpr,
    NAN_CODE: tl.constexpr,
    FNUZ: tl.constexpr,
):
    """uint8 codes of FP32 values: clamped to ±MAX, rounded to nearest even, NaN to NAN_CODE."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    nan = magnitude != magnitude
    magnitude = tl.where(nan | (magnitude > MAX), MAX, magnitude)
    dropped: tl.constexpr = 23 - MANTISSA
    wide = magnitude.to(tl.uint32, bitcast=True)
    normal = ((wide + ((wide >> dropped) & 1) + ((1 << (dropped - 1)) - 1)) >> dropped) - ((127 - BIAS) << MANTISSA)
    # Added to this, a subnormal's unit is the last bit of the sum's mantissa, so the addition rounds it.
    anchor: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    subnormal = (magnitude + anchor).to(tl.uint32, bitcast=True) - ((127 + 24 - BIAS - MANTISSA) << 23)
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    sign = (bits >> 24) & 0x80
    if FNUZ:
        sign = tl.where(code == 0, 0, sign)
    return tl.where(nan, NAN_CODE, code | sign).to(tl.uint8)


@triton.jit
def _write_rows(
    pool_ptr, scale_ptr, row_ptr, token, block, slot, head0,
    stride_block, stride_head, stride_slot_group, stride_slot, stride_dim_group, stride_dim,
    stride_scale_block, stride_scale_head, stride_scale_slot,
    stride_row_token, stride_row_head, stride_row_dim,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, DIMS: tl.constexpr,
    SLOTS_PER_GROUP: tl.constexpr, DIMS_PER_GROUP: tl.constexpr, KIND: tl.constexpr,
    FP8: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN_CODE: tl.constexpr, FNUZ: tl.constexpr,
    CODE_MAX: tl.constexpr, FLOOR: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    head = (head0 + tl.arange(0, HEADS)).to(tl.int64)
    dim = tl.arange(0, DIMS).to(tl.int64)
    mask = (head < NUM_HEADS)[:, None] & (dim < DIM)[None, :]  # [HEADS, DIMS]
    source = row_ptr + token * stride_row_token + head[:, None] * stride_row_head + dim[None, :] * stride_row_dim
    held = tl.load(source, mask=mask, other=0.0)
    if held.dtype == tl.bfloat16:
        values = (held.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        values = held.to(tl.float32)
    scale_at = scale_ptr + block * stride_scale_block + slot * stride_scale_slot + head * stride_scale_head
    if KIND == "per-token-head":
        magnitude = tl.abs(values)
        finite = tl.where(magnitude <= 3.4028234663852886e38, magnitude, 0.0)  # false for NaN as well
        scale = tl.maximum(tl.div_rn(tl.max(finite, axis=1), tl.full([HEADS], CODE_MAX, tl.float32)), FLOOR)
        tl.store(scale_at, scale, mask=head < NUM_HEADS)
        values = tl.div_rn(values, tl.broadcast_to(scale[:, None], [HEADS, DIMS]))
    elif KIND != "none":
        scale = tl.load(scale_at, mask=head < NUM_HEADS, other=1.0)
        values = tl.div_rn(values, tl.broadcast_to(scale[:, None], [HEADS, DIMS]))
    slot_offset = (slot // SLOTS_PER_GROUP) * stride_slot_group + (slot % SLOTS_PER_GROUP) * stride_slot
    dim_offset = (dim // DIMS_PER_GROUP) * stride_dim_group + (dim % DIMS_PER_GROUP) * stride_dim
    target = pool_ptr + block * stride_block + slot_offset + head[:, None] * stride_head + dim_offset[None, :]
    if FP8:
        tl.store(target, encode_fp8(values, MANTISSA, BIAS, CODE_MAX, NAN_CODE, FNUZ), mask=mask)
    else:
        tl.store(target, round_to(values, pool_ptr.dtype.element_ty, BY_HAND), mask=mask)


@triton.jit
def scatter_kernel(
    slot_ptr, too_large_ptr, num_slots,
    k_ptr, k_scale_ptr, k_row_ptr,
    v_ptr, v_scale_ptr, v_row_ptr,
    stride_k_block, stride_k_head, stride_k_slot_group, stride_k_slot, stride_k_dim_group, stride_k_dim,
    stride_v_block, stride_v_head, stride_v_slot_group, stride_v_slot, stride_v_dim_group, stride_v_dim,
    stride_k_scale_block, stride_k_scale_head, stride_k_scale_slot,
    stride_v_scale_block, stride_v_scale_head, stride_v_scale_slot,
    stride_k_row_token, stride_k_row_head, stride_k_row_dim,
    stride_v_row_token, stride_v_row_head, stride_v_row_dim,
    stride_slot_token,
    PAGE: tl.constexpr, NUM_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, K_DIMS: tl.constexpr, V_DIMS: tl.constexpr,
    V_SLOTS_PER_GROUP: tl.constexpr, K_DIMS_PER_GROUP: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    FP8: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN_CODE: tl.constexpr, FNUZ: tl.constexpr,
    CODE_MAX: tl.constexpr, FLOOR: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    index = tl.load(slot_ptr + token * stride_slot_token).to(tl.int64)
    if index < 0:
        return
    if index >= num_slots:
        tl.atomic_max(too_large_ptr, index)
        return
    block = index // PAGE
    slot = index % PAGE
    head0 = tl.program_id(1) * HEADS
    _write_rows(
        k_ptr, k_scale_ptr, k_row_ptr, token, block, slot, head0,
        stride_k_block, stride_k_head, stride_k_slot_group, stride_k_slot, stride_k_dim_group, stride_k_dim,
        stride_k_scale_block, stride_k_scale_head, stride_k_scale_slot,
        stride_k_row_token, stride_k_row_head, stride_k_row_dim,
        NUM_HEADS, K_DIM, HEADS, K_DIMS, 1, K_DIMS_PER_GROUP, K_KIND,
        FP8, MANTISSA, BIAS, NAN_CODE, FNUZ, CODE_MAX, FLOOR, BY_HAND,
    )  # fmt: skip
    _write_rows(
        v_ptr, v_scale_ptr, v_row_ptr, token, block, slot, head0,
        stride_v_block, stride_v_head, stride_v_slot_group, stride_v_slot, stride_v_dim_group, stride_v_dim,
        stride_v_scale_block, stride_v_scale_head, stride_v_scale_slot,
        stride_v_row_token, stride_v_row_head, stride_v_row_dim,
        NUM_HEADS, V_DIM, HEADS, V_DIMS, V_SLOTS_PER_GROUP, 1, V_KIND,
        FP8, MANTISSA, BIAS, NAN_CODE, FNUZ, CODE_MAX, FLOOR, BY_HAND,
    )  # fmt: skip


def launch(
    key_cache: Tensor,
    value_cache: Tensor,
    geometry: Geometry,
    scales: tuple[Scale, Scale],
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    too_large: Tensor,
) -> None:
    """Launch the kernel on checked arguments; see `kvgather.scatter.scatter`."""
    g, fmt = geometry, FORMATS.get(geometry.dtype)
    arguments: list[Any] = []
    strides: list[int] = []
    pools: tuple[tuple[Tensor, Which, Scale, Tensor], ...]
    pools = ((key_cache, "key", scales[0], k), (value_cache, "value", scales[1], v))
    for pool, which, scale, rows in pools:
        held = pool if fmt is None else pool.view(torch.uint8)
        arguments += [held, too_large if scale.tensor is None else scale.tensor, rows]  # no scale: never read
        s = PoolStrides.of(pool, g.layout, which)
        strides += [s.block, s.head, s.slot_group, s.slot, s.dim_group, s.dim]
    for scale in scales:
        strides += [scale.stride_block, scale.stride_head, scale.stride_slot]
    widest = triton.next_power_of_2(max(g.head_dim, g.v_head_dim))
    heads = max(1, min(triton.next_power_of_2(g.num_kv_heads), 4096 // widest))
    interpreted = interpreting()
    with launching(key_cache, interpreted):
        scatter_kernel[(len(slots), triton.cdiv(g.num_kv_heads, heads))](
            slots,
            too_large,
            g.num_blocks * g.page_size,
            *arguments,
            *strides,
            *k.stride(),
            *v.stride(),
            slots.stride(0),
            PAGE=g.page_size,
            NUM_HEADS=g.num_kv_heads,
            K_DIM=g.head_dim,
            V_DIM=g.v_head_dim,
            HEADS=heads,
            K_DIMS=triton.next_power_of_2(g.head_dim),
            V_DIMS=triton.next_power_of_2(g.v_head_dim),
            V_SLOTS_PER_GROUP=PoolStrides.of(value_cache, g.layout, "value").slots_per_group,
            K_DIMS_PER_GROUP=PoolStrides.of(key_cache, g.layout, "key").dims_per_group,
            K_KIND=scales[0].kind,
            V_KIND=scales[1].kind,
            FP8=fmt is not None,
            MANTISSA=0 if fmt is None else fmt.mantissa_bits,
            BIAS=0 if fmt is None else fmt.bias,
            NAN_CODE=0 if fmt is None else fmt.nan_code,
            FNUZ=fmt is not None and fmt.fnuz,
            CODE_MAX=code_max(g.dtype),
            FLOOR=SCALE_FLOOR,
            BY_HAND=interpreted,
        )
