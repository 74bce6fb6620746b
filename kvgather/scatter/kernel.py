"""The kernel that writes new tokens into a paged cache: one program for one token and a group of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..formats.checks import extent
from ..formats.fp8 import FORMATS
from ..formats.layout import Geometry
from ..formats.scale import Scale
from ..kernels.address import PoolForm, element_offset, pool_strides, scale_address
from ..kernels.guards import guard
from ..kernels.launch import PreparedLaunch
from ..kernels.signatures import row_reach
from ..kernels.values import computed_scale, encode_fp8, round_to, widen


@triton.jit
def write_rows(
    pointers,  # pool, scale, rows
    token, block_id, page_offset, first_head,
    strides,  # of the pool, of the scale, of the rows: token, head, dim
    POOL: tl.constexpr, HEADS: tl.constexpr, CODE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Store HEADS heads of one token in one pool, divided by their scale; a per-token-head scale is computed here."""
    pool_ptr, scale_ptr, row_ptr = pointers
    stride_token, stride_head, stride_dim = strides[2]
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)
    dim = tl.arange(0, POOL.dim_lanes).to(tl.int64)
    mask = (head < POOL.num_heads)[:, None] & (dim < POOL.dim)[None, :]  # [HEADS, dim]
    row = row_ptr + token * stride_token + head[:, None] * stride_head + dim[None, :] * stride_dim
    values = widen(tl.load(row, mask=mask, other=0.0), None, False)
    if POOL.kind != "none":
        scale_at = scale_address(scale_ptr, block_id, head, page_offset, strides[1])
        if POOL.kind == "per-token-head":
            scale = computed_scale(values, CODE)
            tl.store(scale_at, scale, mask=head < POOL.num_heads)
        else:
            scale = tl.load(scale_at, mask=head < POOL.num_heads, other=1.0)
        values = tl.div_rn(values, tl.broadcast_to(scale[:, None], [HEADS, POOL.dim_lanes]))
    element = pool_ptr + element_offset(block_id, head[:, None], page_offset, dim[None, :], strides[0], POOL)
    if CODE is not None:
        tl.store(element, encode_fp8(values, CODE), mask=mask)
    else:
        tl.store(element, round_to(values, pool_ptr.dtype.element_ty, BY_HAND), mask=mask)


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
    K: tl.constexpr, V: tl.constexpr,  # a `PoolForm` each
    HEADS: tl.constexpr,
    CODE: tl.constexpr,  # the pools' `Fp8Format`; None: floats
    BY_HAND: tl.constexpr,
):  # fmt: skip
    """Write HEADS heads of one token to its slot, in K and in V:

        pool[block_id, head, page_offset, dim] = encode(row[token, head, dim] / scale[block_id, head, page_offset])

    with slot = block_id · page_size + page_offset. A slot below 0 is padding; one past the pool is skipped, and the
    largest of those is kept.

    Source: the engines' `reshape_and_cache` kernels write slots by this mapping, with one scale for a pool. The scale
    per token and head, computed from its row, is that of dynamic quantization.
    """
    GROUPS: tl.constexpr = (K.num_heads + HEADS - 1) // HEADS
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    first_head = tl.program_id(0) % GROUPS * HEADS
    slot = tl.load(slot_ptr + token * slot_strides[0]).to(tl.int64)
    if slot < 0:
        return
    block_id = slot // K.page_size
    page_offset = slot % K.page_size
    if block_id >= num_blocks:
        tl.atomic_max(too_large_ptr, slot)
        return
    write_rows(
        (k_ptr, k_scale_ptr, k_row_ptr), token, block_id, page_offset, first_head,
        (k_strides, k_scale_strides, k_row_strides), K, HEADS, CODE, BY_HAND,
    )  # fmt: skip
    write_rows(
        (v_ptr, v_scale_ptr, v_row_ptr), token, block_id, page_offset, first_head,
        (v_strides, v_scale_strides, v_row_strides), V, HEADS, CODE, BY_HAND,
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
        forms = (
            PoolForm.of(key_cache, g.layout, "key", scales[0].kind),
            PoolForm.of(value_cache, g.layout, "value", scales[1].kind),
        )
        widest = max(form.dim_lanes for form in forms)
        heads = max(1, min(triton.next_power_of_2(g.num_kv_heads), 4096 // widest))
        self._groups, self._num_blocks = triton.cdiv(g.num_kv_heads, heads), g.num_blocks
        interpreted = interpreting()
        strides = (
            (slots.stride(0),),
            pool_strides(key_cache, g.layout, "key", forms[0]),
            pool_strides(value_cache, g.layout, "value", forms[1]),
            *(scale.strides for scale in scales),
            k.stride(),
            v.stride(),
        )
        constants = {"K": forms[0], "V": forms[1], "HEADS": heads, "CODE": fmt, "BY_HAND": interpreted}
        codes = None if fmt is None else torch.uint8
        k_stand_in, v_stand_in = (codes if scale.tensor is None else None for scale in scales)
        views = (None, None, codes, k_stand_in, None, codes, v_stand_in, None)
        self._launch = PreparedLaunch(scatter_kernel, views, strides, constants, interpreted)
        self._too_large, self._too_large_at = too_large, too_large.data_ptr()
        # The pool stands in for a scale that is never read.
        self._k = key_cache, key_cache if scales[0].tensor is None else scales[0].tensor
        self._v = value_cache, value_cache if scales[1].tensor is None else scales[1].tensor
        self._k_at = self._k[0].data_ptr(), self._k[1].data_ptr()
        self._v_at = self._v[0].data_ptr(), self._v[1].data_ptr()

        self.on_gpu = not interpreted

    def remember(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Remember rows and slots that passed every check, for `again`."""
        rows = (k, v, slots)
        self._looks_like = guard(rows, [(None, *t.shape[1:]) for t in rows], [t.stride() for t in rows])
        self._alignment = (k.data_ptr() & 15, v.data_ptr() & 15, slots.data_ptr() & 15)
        self._sizes = k.element_size(), v.element_size(), slots.element_size()
        self._reach = row_reach(k) * k.element_size(), row_reach(v) * v.element_size()
        self._step = k.stride(0) * k.element_size(), v.stride(0) * v.element_size(), slots.stride(0)
        self._ends = [
            at + extent(pool) * pool.element_size()
            for at, pool in ((self._k_at[0], self._k[0]), (self._v_at[0], self._v[0]))
        ]

    def again(self, k: Tensor, v: Tensor, slots: Tensor) -> tuple[int, int, int] | None:
        """Whether this launch can write these rows to these slots: they pass the checks of the remembered ones.

        Rows that may share memory with a pool do not. The values of slots are not checked, nor are the pools and
        scales, which the cache has just checked.

        Returns:
            The addresses of k, v and slots, or None.
        """
        if not self._looks_like(k, v, slots):
            return None
        k_begin, v_begin, slots_at = k.data_ptr(), v.data_ptr(), slots.data_ptr()
        if (k_begin & 15, v_begin & 15, slots_at & 15) != self._alignment:
            return None
        tokens = slots.shape[0]
        if k.shape[0] != tokens or v.shape[0] != tokens or tokens == 0:
            return None
        (k_size, v_size, slot_size), (k_step, v_step, slot_step) = self._sizes, self._step
        k_reach, v_reach = self._reach
        more = tokens - 1
        k_bytes, v_bytes = more * k_step + k_reach, more * v_step + v_reach
        (k_pool, _), (v_pool, _), (k_pool_end, v_pool_end) = self._k_at, self._v_at, self._ends
        k_end, v_end = k_begin + k_bytes, v_begin + v_bytes
        fits = (
            k.storage_offset() * k_size + k_bytes <= k.untyped_storage().nbytes()
            and v.storage_offset() * v_size + v_bytes <= v.untyped_storage().nbytes()
            and (slots.storage_offset() + more * slot_step + 1) * slot_size <= slots.untyped_storage().nbytes()
            and (k_end <= k_pool or k_pool_end <= k_begin)
            and (k_end <= v_pool or v_pool_end <= k_begin)
            and (v_end <= k_pool or k_pool_end <= v_begin)
            and (v_end <= v_pool or v_pool_end <= v_begin)
        )
        return (k_begin, v_begin, slots_at) if fits else None

    def __call__(self, k: Tensor, v: Tensor, slots: Tensor, addresses: tuple[int, int, int] | None = None) -> None:
        """Write rows `[n, heads, dim]` into their slots `[n]`; `addresses` are from `again`."""
        k_at, v_at, slots_at = addresses or (k.data_ptr(), v.data_ptr(), slots.data_ptr())
        programs, numbers = slots.shape[0] * self._groups, (self._num_blocks,)
        pointers = (slots_at, self._too_large_at, *self._k_at, k_at, *self._v_at, v_at)
        if programs == 0 or not self._launch.again(programs, pointers, numbers):
            tensors = (slots, self._too_large, *self._k, k, *self._v, v)
            self._launch(programs, tensors, pointers, numbers)
