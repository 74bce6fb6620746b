"""The kernel that writes new tokens into a paged cache: one program for one token and a group of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..formats.checks import extent
from ..formats.fp8 import FORMATS, SCALE_FLOOR, code_max
from ..formats.layout import Geometry, PoolStrides
from ..formats.scale import Scale
from ..kernels.guards import guard
from ..kernels.launch import PreparedLaunch
from ..kernels.signatures import inside, row_reach
from ..kernels.values import encode_fp8, round_to, widen


@triton.jit
def _write_rows(
    pool_ptr, scale_ptr, row_ptr, token, block, slot, head0, strides, scale_strides, row_strides,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, DIMS: tl.constexpr,
    SLOTS_PER_GROUP: tl.constexpr, DIMS_PER_GROUP: tl.constexpr, KIND: tl.constexpr,
    CODE: tl.constexpr, CODE_MAX: tl.constexpr, FLOOR: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Quantize one token's heads and put them into (block, slot) of one pool, their computed scale beside them."""
    stride_block, stride_head, stride_slot_group, stride_slot, stride_dim_group, stride_dim = strides
    stride_scale_block, stride_scale_head, stride_scale_slot = scale_strides
    stride_row_token, stride_row_head, stride_row_dim = row_strides
    head = (head0 + tl.arange(0, HEADS)).to(tl.int64)
    dim = tl.arange(0, DIMS).to(tl.int64)
    mask = (head < NUM_HEADS)[:, None] & (dim < DIM)[None, :]  # [HEADS, DIMS]
    source = row_ptr + token * stride_row_token + head[:, None] * stride_row_head + dim[None, :] * stride_row_dim
    values = widen(tl.load(source, mask=mask, other=0.0), None, False)
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
    if CODE is not None:
        tl.store(target, encode_fp8(values, CODE), mask=mask)
    else:
        tl.store(target, round_to(values, pool_ptr.dtype.element_ty, BY_HAND), mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def scatter_kernel(
    slot_ptr, too_large_ptr,
    k_ptr, k_scale_ptr, k_row_ptr,
    v_ptr, v_scale_ptr, v_row_ptr,
    num_blocks,
    slot_strides,  # token
    k_strides, v_strides,  # block, head, slot group, slot, dim group, dim
    k_scale_strides, v_scale_strides,  # block, head, slot
    k_row_strides, v_row_strides,  # token, head, dim
    PAGE: tl.constexpr, NUM_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, K_DIMS: tl.constexpr, V_DIMS: tl.constexpr,
    V_SLOTS_PER_GROUP: tl.constexpr, K_DIMS_PER_GROUP: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    CODE: tl.constexpr, CODE_MAX: tl.constexpr, FLOOR: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """pool[block, head, slot] = encode(row[token, head] / scale), for one token and HEADS of its heads.

    A slot below 0 is padding; one past the pool is skipped, and the largest of those is kept.
    """
    GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    head0 = tl.program_id(0) % GROUPS * HEADS
    index = tl.load(slot_ptr + token * slot_strides[0]).to(tl.int64)
    if index < 0:
        return
    block = index // PAGE
    slot = index % PAGE
    if block >= num_blocks:
        tl.atomic_max(too_large_ptr, index)
        return
    _write_rows(
        k_ptr, k_scale_ptr, k_row_ptr, token, block, slot, head0, k_strides, k_scale_strides, k_row_strides,
        NUM_HEADS, K_DIM, HEADS, K_DIMS, 1, K_DIMS_PER_GROUP, K_KIND,
        CODE, CODE_MAX, FLOOR, BY_HAND,
    )  # fmt: skip
    _write_rows(
        v_ptr, v_scale_ptr, v_row_ptr, token, block, slot, head0, v_strides, v_scale_strides, v_row_strides,
        NUM_HEADS, V_DIM, HEADS, V_DIMS, V_SLOTS_PER_GROUP, 1, V_KIND,
        CODE, CODE_MAX, FLOOR, BY_HAND,
    )  # fmt: skip


class ScatterLaunch:
    """The write of rows of one kind into one cache: all that its launches share."""

    def __init__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        geometry: Geometry,
        scales: tuple[Scale, Scale],
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        too_large: Tensor,
    ) -> None:
        """Prepare the launches, of checked arguments; see `kvgather.scatter.scatter`."""
        g, fmt = geometry, FORMATS.get(geometry.dtype)
        pools = (
            PoolStrides.of(key_cache, g.layout, "key"),
            PoolStrides.of(value_cache, g.layout, "value"),
        )
        widest = triton.next_power_of_2(max(g.head_dim, g.v_head_dim))
        heads = max(1, min(triton.next_power_of_2(g.num_kv_heads), 4096 // widest))
        self._groups, self._num_blocks = triton.cdiv(g.num_kv_heads, heads), g.num_blocks
        interpreted = interpreting()
        strides = (
            (slots.stride(0),),
            *((s.block, s.head, s.slot_group, s.slot, s.dim_group, s.dim) for s in pools),
            *((scale.stride_block, scale.stride_head, scale.stride_slot) for scale in scales),
            k.stride(),
            v.stride(),
        )
        constants = {
            "PAGE": g.page_size,
            "NUM_HEADS": g.num_kv_heads,
            "K_DIM": g.head_dim,
            "V_DIM": g.v_head_dim,
            "HEADS": heads,
            "K_DIMS": triton.next_power_of_2(g.head_dim),
            "V_DIMS": triton.next_power_of_2(g.v_head_dim),
            "V_SLOTS_PER_GROUP": pools[1].slots_per_group,
            "K_DIMS_PER_GROUP": pools[0].dims_per_group,
            "K_KIND": scales[0].kind,
            "V_KIND": scales[1].kind,
            "CODE": fmt,
            "CODE_MAX": code_max(g.dtype),
            "FLOOR": SCALE_FLOOR,
            "BY_HAND": interpreted,
        }
        codes = None if fmt is None else torch.uint8
        stands_in = [codes if scale.tensor is None else None for scale in scales]
        views = (None, None, codes, stands_in[0], None, codes, stands_in[1], None)
        self._launch = PreparedLaunch(scatter_kernel, views, strides, constants, interpreted)
        self._too_large, self._too_large_at = too_large, too_large.data_ptr()
        # The pool stands in for a scale that is never read.
        self._k = key_cache, key_cache if scales[0].tensor is None else scales[0].tensor
        self._v = value_cache, value_cache if scales[1].tensor is None else scales[1].tensor
        self._k_at = self._k[0].data_ptr(), self._k[1].data_ptr()
        self._v_at = self._v[0].data_ptr(), self._v[1].data_ptr()

        self.on_gpu = not interpreted

    def remember(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Remember what rows and slots were like that passed every check, for `fits`."""
        rows = (k, v, slots)
        self._looks_like = guard(rows, [(None, *t.shape[1:]) for t in rows], [t.stride() for t in rows])
        self._alignment = (k.data_ptr() & 15, v.data_ptr() & 15, slots.data_ptr() & 15)
        self._sizes = k.element_size(), v.element_size()
        self._reach = row_reach(k), row_reach(v)
        self._ends = [
            at + extent(pool) * pool.element_size()
            for at, pool in ((self._k_at[0], self._k[0]), (self._v_at[0], self._v[0]))
        ]

    def fits(self, k: Tensor, v: Tensor, slots: Tensor) -> bool:
        """Whether this launch can write these rows to these slots: they pass the checks that those remembered passed.

        Rows that may share memory with a pool do not. Slots past the pool, or twice, are not looked at; nor are the
        pools and scales, which the cache has just looked at.
        """
        if not self._looks_like(k, v, slots):
            return False
        k_begin, v_begin = k.data_ptr(), v.data_ptr()
        if (k_begin & 15, v_begin & 15, slots.data_ptr() & 15) != self._alignment:
            return False
        tokens = slots.shape[0]
        if k.shape[0] != tokens or v.shape[0] != tokens or tokens == 0:
            return False
        (k_size, v_size), (k_reach, v_reach) = self._sizes, self._reach
        k_bytes = ((tokens - 1) * k.stride(0) + k_reach) * k_size
        v_bytes = ((tokens - 1) * v.stride(0) + v_reach) * v_size
        k_pool, k_pool_end, v_pool, v_pool_end = self._k_at[0], self._ends[0], self._v_at[0], self._ends[1]
        k_end, v_end = k_begin + k_bytes, v_begin + v_bytes
        return (
            k.storage_offset() * k_size + k_bytes <= k.untyped_storage().nbytes()
            and v.storage_offset() * v_size + v_bytes <= v.untyped_storage().nbytes()
            and inside(slots, (tokens - 1) * slots.stride(0))
            and (k_end <= k_pool or k_pool_end <= k_begin)
            and (k_end <= v_pool or v_pool_end <= k_begin)
            and (v_end <= k_pool or k_pool_end <= v_begin)
            and (v_end <= v_pool or v_pool_end <= v_begin)
        )

    def __call__(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write rows `[n, heads, dim]` into their slots `[n]`."""
        self._launch(
            slots.shape[0] * self._groups,
            (slots, self._too_large, *self._k, k, *self._v, v),
            (slots.data_ptr(), self._too_large_at, *self._k_at, k.data_ptr(), *self._v_at, v.data_ptr()),
            (self._num_blocks,),
        )
