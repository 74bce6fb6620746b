"""What the direct kernel loads from a cache: rows of K and of V, whatever the layout, and the scales of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .values import decode_fp8, widen


@triton.jit
def as_operand(held, CODE: tl.constexpr, HARDWARE: tl.constexpr, dtype: tl.constexpr):
    """What a pool holds as an operand of a dot; FP16 and BF16 hold every FP8 value exactly."""
    if CODE is not None:
        if HARDWARE and dtype == tl.float16 and CODE.name == "e4m3fn":
            operand = held.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        elif dtype == tl.float16 and CODE.name == "e5m2":
            operand = (held.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
        else:
            operand = decode_fp8(held, CODE, HARDWARE).to(dtype)
    elif dtype == tl.float32:
        operand = widen(held, CODE, HARDWARE)
    else:
        operand = held.to(dtype)
    return operand


@triton.jit
def load_rows(
    pool_ptr, ids, key, dim, present, dims_present, strides,
    PAGE: tl.constexpr, DIMS_PER_GROUP: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, DIMS_MASKED: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """Rows of one head of a pool, `[N, D]`; zeros where they are not present."""
    stride_block, _, stride_slot, _, stride_dim_group, stride_dim = strides
    slot = key % PAGE
    if WIDE:
        slot = slot.to(tl.int64)
        dim = dim.to(tl.int64)
    # Strides come divided by ALIGN: their product is a multiple of it that Triton can see, and loads that widely.
    if DIMS_PER_GROUP > 1:  # K of SHUFFLE
        dim_offset = (dim // DIMS_PER_GROUP) * stride_dim_group * ALIGN + (dim % DIMS_PER_GROUP) * stride_dim
    else:
        dim_offset = dim * stride_dim_group
    offset = (ids.to(tl.int64) * stride_block * ALIGN + slot * stride_slot * ALIGN)[:, None] + dim_offset[None, :]
    if not (MASKED or DIMS_MASKED):
        held = tl.load(pool_ptr + offset)
    elif INTEGER:
        held = tl.load(pool_ptr + offset, mask=present[:, None] & dims_present[None, :], other=0)
    else:
        held = tl.load(pool_ptr + offset, mask=present[:, None] & dims_present[None, :], other=0.0)
    return held


@triton.jit
def load_shuffled_rows(
    pool_ptr, table_ptr, first_key, end, dim, present, dims_present, strides,
    PAGE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, DIMS_MASKED: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """Rows of one head of SHUFFLE's V, `[N, D]`; zeros where they are not present.

    A group of slots, 16 bytes of one dim, is read whole: as `[D, groups, GROUP]`, so that lanes go from dim to dim.
    """
    stride_block, _, stride_slot_group, stride_slot, stride_dim, _ = strides
    key = first_key + tl.arange(0, N // GROUP) * GROUP  # [groups]: the first of each
    if MASKED:
        ids = tl.load(table_ptr + key // PAGE, mask=key < end, other=0)
    else:
        ids = tl.load(table_ptr + key // PAGE)
    group = key % PAGE // GROUP
    if WIDE:
        group = group.to(tl.int64)
        dim = dim.to(tl.int64)
    group_offset = tl.maximum(ids, 0).to(tl.int64) * stride_block * ALIGN + group * stride_slot_group * ALIGN
    slot_offset = tl.arange(0, GROUP) * stride_slot
    offset = (dim * stride_dim * ALIGN)[:, None, None] + group_offset[None, :, None] + slot_offset[None, None, :]
    if not (MASKED or DIMS_MASKED):
        held = tl.load(pool_ptr + offset)
    elif INTEGER:
        held = tl.load(pool_ptr + offset, mask=dims_present[:, None, None] & (key < end)[None, :, None], other=0)
    else:
        held = tl.load(pool_ptr + offset, mask=dims_present[:, None, None] & (key < end)[None, :, None], other=0.0)
    rows = tl.trans(tl.reshape(held, [dim.shape[0], N]))
    if MASKED:
        rows = tl.where(present[:, None], rows, tl.zeros_like(rows))
    return rows


@triton.jit
def load_key_scale(scale_ptr, ids, slot, present, strides, KIND: tl.constexpr, MASKED: tl.constexpr):
    """The scale of each key of one head, `[N]`, of the kinds that differ from key to key."""
    offset = ids.to(tl.int64) * strides[0]
    if KIND == "per-token-head":
        offset += slot.to(tl.int64) * strides[2]
    if MASKED:
        return tl.load(scale_ptr + offset, mask=present, other=1.0)
    return tl.load(scale_ptr + offset)
