"""What attention loads of a paged pool: tiles of K and of V for a range of keys, and scales, in any layout.

Keys have positions in their sequence; a key's block is `block_table[key // page_size]`, its place in the block
`page_offset = key % page_size`. Pointers to tiles, and to the scales of keys, are at their head already.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .address import block_offset, dim_offset, scale_offset, slot_group_offset, slot_offset
from .values import decode_fp8, widen


@triton.jit
def as_operand(codes, CODE: tl.constexpr, HARDWARE: tl.constexpr, dtype: tl.constexpr):
    """A pool's elements as an operand of a dot; FP16 and BF16 hold every FP8 value exactly."""
    if CODE is not None:
        if HARDWARE and dtype == tl.float16 and CODE.name == "e4m3fn":
            operand = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        elif dtype == tl.float16 and CODE.name == "e5m2":
            operand = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
        else:
            operand = decode_fp8(codes, CODE, HARDWARE).to(dtype)
    elif dtype == tl.float32:
        operand = widen(codes, CODE, HARDWARE)
    else:
        operand = codes.to(dtype)
    return operand


@triton.jit
def load_block_ids(table_ptr, key, present, POOL: tl.constexpr, MASKED: tl.constexpr):
    """The block ids of keys, as the table has them: negative where it was given a bad one; 0 for absent keys."""
    if MASKED:
        return tl.load(table_ptr + key // POOL.page_size, mask=present, other=0)
    return tl.load(table_ptr + key // POOL.page_size)


@triton.jit
def load_rows(
    pool_ptr, block_id, page_offset, present, strides, POOL: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows of one head, `[N, COLUMNS]` with COLUMNS ≥ head_dim; 0 past head_dim and, if MASKED, for absent keys.

    Args:
        block_id, page_offset, present: `[N]`; ids are those of the pool's blocks.
        strides: the pool's.
    """
    dim = tl.arange(0, COLUMNS)
    in_head = dim < POOL.dim
    if POOL.wide:
        page_offset = page_offset.to(tl.int64)
        dim = dim.to(tl.int64)
    columns = dim_offset(dim, strides, POOL)
    rows = block_offset(block_id.to(tl.int64), strides, POOL) + slot_offset(page_offset, strides, POOL)
    offset = rows[:, None] + columns[None, :]
    if MASKED or COLUMNS > POOL.dim:
        return tl.load(pool_ptr + offset, mask=present[:, None] & in_head[None, :], other=0)
    return tl.load(pool_ptr + offset)


@triton.jit
def load_shuffled_rows(
    pool_ptr, table_ptr, first_key, end, present, strides,
    POOL: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`load_rows` for V in SHUFFLE, of N keys from `first_key` on; only those before `end` are read.

    A group of slots, 16 bytes of one dim, is read whole: as `[COLUMNS, groups, slots of a group]`, so that lanes go
    from dim to dim. A transposition on chip makes rows of it.
    """
    GROUP: tl.constexpr = POOL.slots_per_group
    key = first_key + tl.arange(0, N // GROUP) * GROUP  # [groups]: the first of each
    exists = key < end
    block_id = load_block_ids(table_ptr, key, exists, POOL, MASKED)
    group = key % POOL.page_size // GROUP
    dim = tl.arange(0, COLUMNS)
    in_head = dim < POOL.dim
    if POOL.wide:
        group = group.to(tl.int64)
        dim = dim.to(tl.int64)
    group_offset = block_offset(tl.maximum(block_id, 0).to(tl.int64), strides, POOL)
    group_offset += slot_group_offset(group, strides, POOL)
    slot_offsets = tl.arange(0, GROUP) * strides[3]
    offset = dim_offset(dim, strides, POOL)[:, None, None] + group_offset[None, :, None] + slot_offsets[None, None, :]
    if MASKED or COLUMNS > POOL.dim:
        codes = tl.load(pool_ptr + offset, mask=in_head[:, None, None] & exists[None, :, None], other=0)
    else:
        codes = tl.load(pool_ptr + offset)
    rows = tl.trans(tl.reshape(codes, [COLUMNS, N]))
    if MASKED:
        rows = tl.where(present[:, None], rows, tl.zeros_like(rows))
    return rows


@triton.jit
def load_head_scale(scale_ptr, head, strides, POOL: tl.constexpr):
    """The scale of all keys of a head; 1 where there is none, or one for each key (`load_key_scale`)."""
    if POOL.kind == "per-tensor":
        return tl.load(scale_ptr)
    elif POOL.kind == "per-head":
        return tl.load(scale_ptr + scale_offset(0, head.to(tl.int64), 0, strides))
    else:
        return 1.0


@triton.jit
def load_key_scale(scale_ptr, block_id, page_offset, present, strides, POOL: tl.constexpr, MASKED: tl.constexpr):
    """The scale of each key `[N]` of a head, of the kinds that differ from key to key; 1 for absent keys."""
    if POOL.kind == "per-token-head":
        offset = scale_offset(block_id.to(tl.int64), 0, page_offset.to(tl.int64), strides)
    else:
        offset = scale_offset(block_id.to(tl.int64), 0, 0, strides)
    if MASKED:
        return tl.load(scale_ptr + offset, mask=present, other=1.0)
    return tl.load(scale_ptr + offset)
