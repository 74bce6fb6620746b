"""The address of an element of a paged pool, and of its scale: one formula for every kernel.

The specification, in torch, is `formats.layout.PoolStrides.offset`. With g slots and h dims in a group,

    offset(block, head, page_offset, dim) = block · stride_block + head · stride_head
        + (page_offset // g) · stride_slot_group + (page_offset % g) · stride_slot
        + (dim // h) · stride_dim_group + (dim % h) · stride_dim

in elements; g > 1 only for V in SHUFFLE, h > 1 only for K in SHUFFLE. A scale is at

    offset(block, head, page_offset) = block · stride_block + head · stride_head + page_offset · stride_slot

with strides of 0 along the axes that its kind lacks (`formats.scale.Scale`).

A kernel takes the strides of a tensor as one tuple, and everything about a pool that it is compiled for as one
constant, a `PoolForm`. The strides of blocks, heads and groups are passed in units of `align` elements: Triton sees
that `stride * align` is a multiple of `align`, and loads that many elements at once.

Callers choose the integer width: offsets inside a block are 32-bit unless the form is `wide`; `block` is int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..formats.layout import PoolStrides, Which, as_nhd
from .launch import granule, inner_extent


@dataclass(frozen=True)
class PoolForm:
    """What a kernel is compiled for of one pool, K's or V's: passed as one `tl.constexpr`.

    Attributes:
        page_size: slots of a block.
        num_heads: KV heads.
        dim: elements of a head.
        slots_per_group, dims_per_group: elements that SHUFFLE keeps together, of V and of K; 1 elsewhere.
        align: what the strides of blocks, heads and groups are divided by; see `pool_strides`.
        wide: whether offsets inside a block can reach 2^31.
        kind: of the scale, as the kernel distinguishes kinds.
    """

    page_size: int
    num_heads: int
    dim: int
    slots_per_group: int
    dims_per_group: int
    align: int
    wide: bool
    kind: str

    @classmethod
    def of(cls, pool: Tensor, layout: str, which: Which, kind: str) -> PoolForm:
        """The form of a checked pool in `layout`, whose scale is of `kind`."""
        page_size, num_heads, dim = as_nhd(pool[:0], layout, which).shape[1:]
        strides = PoolStrides.of(pool, layout, which)
        grouped = layout == "SHUFFLE"  # elsewhere a group of dims is one element, and its stride is 1
        outer = (strides.block, strides.head, strides.slot_group, strides.dim_group if grouped else 0)
        return cls(
            page_size,
            num_heads,
            dim,
            strides.slots_per_group,
            strides.dims_per_group,
            align=granule(outer, pool.element_size()),
            wide=inner_extent(pool) >= 2**31,
            kind=kind,
        )

    @property
    def grouped(self) -> bool:
        """Whether the layout is SHUFFLE."""
        return self.slots_per_group > 1 or self.dims_per_group > 1

    @property
    def dim_lanes(self) -> int:
        """`dim`, or the next power of two: what `tl.arange` takes."""
        return 1 << (self.dim - 1).bit_length()


def pool_strides(pool: Tensor, layout: str, which: Which, form: PoolForm) -> tuple[int, ...]:
    """A pool's strides as kernels take them: block, head, slot group, slot, dim group, dim.

    Those of blocks, heads and slot groups, and in SHUFFLE of dim groups, are in units of `form.align` elements.
    """
    s, align = PoolStrides.of(pool, layout, which), form.align
    dim_group = s.dim_group // align if form.grouped else s.dim_group
    return s.block // align, s.head // align, s.slot_group // align, s.slot, dim_group, s.dim


@triton.jit
def block_offset(block_id, strides, POOL: tl.constexpr):
    """Offset of a block; `block_id` int64."""
    return block_id * strides[0] * POOL.align


@triton.jit
def head_offset(head, strides, POOL: tl.constexpr):
    """Offset of a head inside a block."""
    return head * strides[1] * POOL.align


@triton.jit
def slot_group_offset(group, strides, POOL: tl.constexpr):
    """Offset of a group of slots inside a head; a group is one slot, but for V in SHUFFLE."""
    return group * strides[2] * POOL.align


@triton.jit
def slot_offset(page_offset, strides, POOL: tl.constexpr):
    """Offset of a slot inside a head: `page_offset` counts tokens inside the block."""
    if POOL.slots_per_group > 1:  # V of SHUFFLE
        group = slot_group_offset(page_offset // POOL.slots_per_group, strides, POOL)
        return group + (page_offset % POOL.slots_per_group) * strides[3]
    else:
        return slot_group_offset(page_offset, strides, POOL)


@triton.jit
def dim_offset(dim, strides, POOL: tl.constexpr):
    """Offset of a dim inside a slot."""
    if POOL.dims_per_group > 1:  # K of SHUFFLE
        group = (dim // POOL.dims_per_group) * strides[4] * POOL.align
        return group + (dim % POOL.dims_per_group) * strides[5]
    elif POOL.slots_per_group > 1:  # V of SHUFFLE
        return dim * strides[4] * POOL.align
    else:
        return dim * strides[4]


@triton.jit
def element_offset(block_id, head, page_offset, dim, strides, POOL: tl.constexpr):
    """Offset of an element from the pool's first; the four broadcast. Terms are added from block to dim."""
    slot = block_offset(block_id, strides, POOL) + head_offset(head, strides, POOL)
    return slot + slot_offset(page_offset, strides, POOL) + dim_offset(dim, strides, POOL)


@triton.jit
def scale_offset(block_id, head, page_offset, strides):
    """Offset of the scale of a slot's head; the three broadcast, int64."""
    return block_id * strides[0] + head * strides[1] + page_offset * strides[2]


@triton.jit
def scale_address(scale_ptr, block_id, head, page_offset, strides):
    """Pointer to the scale of a slot's head; the three broadcast, int64.

    The strides are added to the pointer one by one: the sum of the three terms first takes two more registers in the
    gather of NHD with per-token-head scales, 34 for 32, which lets fewer programs run at a time (H100).
    """
    return scale_ptr + block_id * strides[0] + head * strides[1] + page_offset * strides[2]
