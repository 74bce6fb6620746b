"""The three layouts of a paged KV cache, as shapes and strides.

NHD      K, V `[blocks, page, heads, dim]`                                the heads of a token are adjacent
HND      K, V `[blocks, heads, page, dim]`                                the tokens of a head are adjacent
SHUFFLE  K `[blocks, heads, dim/x, page, x]`, V `[blocks, heads, page/x, dim, x]`   with x = 16 // itemsize

In SHUFFLE the last axis is 16 bytes: x dims of one token in K, one dim of x tokens in V. A pool is read through the
strides of its tensor, without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .checks import check_choice, check_int, check_tensor, dtype_name
from .fp8 import POOL_DTYPES

LAYOUTS = ("NHD", "HND", "SHUFFLE")
Which = Literal["key", "value"]
Index = TypeVar("Index", int, Tensor)


def group(itemsize: int) -> int:
    """Return x, the number of elements in a contiguous group of SHUFFLE: 16 bytes."""
    return 16 // itemsize


def _check_shuffle(page_size: int, head_dim: int, itemsize: int, which: Which) -> None:
    x = group(itemsize)
    if which == "key" and head_dim % x:
        raise ValueError(f"head_dim is {head_dim}; accepted in SHUFFLE with {itemsize}-byte elements: multiples of {x}")
    if page_size % x:
        raise ValueError(
            f"page_size is {page_size}; accepted in SHUFFLE with {itemsize}-byte elements: multiples of {x}"
        )


def pool_shape(
    layout: str, which: Which, num_blocks: int, page_size: int, num_heads: int, dim: int, itemsize: int
) -> tuple[int, ...]:
    """Return the shape of a K or V pool in a layout.

    Args:
        layout: "NHD", "HND" or "SHUFFLE".
        which: "key" or "value".
        num_blocks, page_size, num_heads, dim: the geometry; `dim` is the head_dim of K or of V.
        itemsize: bytes of an element.

    Raises:
        ValueError: the layout is unknown, or SHUFFLE's groups do not divide page_size or K's head_dim.
    """
    check_choice(layout, "layout", LAYOUTS)
    check_choice(which, "which", ("key", "value"))
    if layout == "NHD":
        return num_blocks, page_size, num_heads, dim
    if layout == "HND":
        return num_blocks, num_heads, page_size, dim
    _check_shuffle(page_size, dim, itemsize, which)
    x = group(itemsize)
    if which == "key":
        return num_blocks, num_heads, dim // x, page_size, x
    return num_blocks, num_heads, page_size // x, dim, x


def key_shape(
    layout: str, num_blocks: int, page_size: int, num_heads: int, head_dim: int, itemsize: int
) -> tuple[int, ...]:
    """Return the shape of the K pool; see `pool_shape`."""
    return pool_shape(layout, "key", num_blocks, page_size, num_heads, head_dim, itemsize)


def value_shape(
    layout: str, num_blocks: int, page_size: int, num_heads: int, head_dim: int, itemsize: int
) -> tuple[int, ...]:
    """Return the shape of the V pool; see `pool_shape`."""
    return pool_shape(layout, "value", num_blocks, page_size, num_heads, head_dim, itemsize)


@dataclass(frozen=True)
class PoolStrides:
    """Strides of one pool in elements, each named after its axis.

    Element (block, head, slot, dim), where `slot` is the page offset, has the offset `block·block + head·head
    + (slot // g)·slot_group + (slot % g)·slot + (dim // h)·dim_group + (dim % h)·dim`. In SHUFFLE, g is x for V and h
    is x for K. Otherwise both are 1, and only the group strides matter.
    """

    block: int
    head: int
    slot_group: int
    slot: int
    dim_group: int
    dim: int
    slots_per_group: int
    dims_per_group: int

    @classmethod
    def of(cls, pool: Tensor, layout: str, which: Which) -> PoolStrides:
        s = pool.stride()
        if layout == "NHD":
            return cls(s[0], s[2], s[1], 0, s[3], 0, 1, 1)
        if layout == "HND":
            return cls(s[0], s[1], s[2], 0, s[3], 0, 1, 1)
        if which == "key":
            return cls(s[0], s[1], s[3], 0, s[2], s[4], 1, pool.shape[4])
        return cls(s[0], s[1], s[2], s[4], s[3], 0, pool.shape[4], 1)

    def offset(self, block: Index, head: Index, slot: Index, dim: Index) -> Index:
        """Return an element's offset from the pool's first element; indices are ints or broadcastable int64 tensors."""
        g, h = self.slots_per_group, self.dims_per_group
        return (
            block * self.block
            + head * self.head
            + (slot // g) * self.slot_group
            + (slot % g) * self.slot
            + (dim // h) * self.dim_group
            + (dim % h) * self.dim
        )


@dataclass(frozen=True)
class Geometry:
    """The sizes of a paged cache, read from its two pools.

    Attributes:
        layout: "NHD", "HND" or "SHUFFLE".
        num_blocks, page_size, num_kv_heads: shared by K and V.
        head_dim, v_head_dim: of K and of V; they may differ.
        dtype, device: shared by K and V.
    """

    layout: str
    num_blocks: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def x(self) -> int:
        return group(self.dtype.itemsize)

    @classmethod
    def of(cls, key_cache: Tensor, value_cache: Tensor, layout: str) -> Geometry:
        """Read the geometry from two pools and check that they match.

        Args:
            key_cache, value_cache: pools in `layout`, FP8, bfloat16, float16 or float32; any strides.
            layout: "NHD", "HND" or "SHUFFLE".

        Raises:
            TypeError: a pool is not a tensor, or its dtype is not accepted.
            ValueError: shapes, dtypes or devices do not match the layout or each other.
        """
        check_choice(layout, "layout", LAYOUTS)
        sizes = []
        for which, pool in (("key", key_cache), ("value", value_cache)):
            check_pool(pool, f"{which}_cache", None if which == "key" else key_cache.device)
            sizes.append(_read_sizes(pool, layout, "key" if which == "key" else "value"))
        (blocks, page, heads, k_dim), (*v_sizes, v_dim) = sizes
        if v_sizes != [blocks, page, heads]:
            raise ValueError(
                f"value_cache has {v_sizes[0]} blocks, page {v_sizes[1]}, {v_sizes[2]} heads; accepted: the sizes of "
                f"key_cache, {blocks} blocks, page {page}, {heads} heads"
            )
        if value_cache.dtype != key_cache.dtype:
            raise TypeError(
                f"value_cache has dtype {dtype_name(value_cache.dtype)}; accepted: key_cache's, "
                f"{dtype_name(key_cache.dtype)}"
            )
        return cls(layout, blocks, page, heads, k_dim, v_dim, key_cache.dtype, key_cache.device)


def check_pool(pool: object, name: str, device: torch.device | None = None) -> Tensor:
    """Return `pool` if it is a dense tensor of a pool dtype, on `device` if that is not None.

    Raises:
        TypeError, ValueError: it is not. For uint8 the message says how to view codes in their FP8 dtype.
    """
    if isinstance(pool, Tensor) and pool.dtype == torch.uint8:
        raise TypeError(
            f"{name} has dtype uint8; accepted: {', '.join(dtype_name(d) for d in POOL_DTYPES)}; for FP8 codes "
            f"stored as bytes: {name}.view(torch.float8_e4m3fn), or the dtype of their format"
        )
    return check_tensor(pool, name, dtypes=POOL_DTYPES, device=device)


def _read_sizes(pool: Tensor, layout: str, which: Which) -> tuple[int, int, int, int]:
    """Return (blocks, page, heads, dim) of a pool, or raise an error with the layout's shape."""
    name, shape, itemsize = f"{which}_cache", list(pool.shape), pool.element_size()
    x = group(itemsize)
    accepted = {
        "NHD": "[blocks, page, heads, dim]",
        "HND": "[blocks, heads, page, dim]",
        "SHUFFLE": f"[blocks, heads, dim/{x}, page, {x}]" if which == "key" else f"[blocks, heads, page/{x}, dim, {x}]",
    }[layout]
    fits = len(shape) == (5 if layout == "SHUFFLE" else 4) and min(shape[1:]) > 0
    if not fits or (layout == "SHUFFLE" and shape[4] != x):
        raise ValueError(
            f"{name} has shape {shape}; accepted for layout {layout} and {dtype_name(pool.dtype)}: {accepted}"
        )
    if layout == "NHD":
        return shape[0], shape[1], shape[2], shape[3]
    if layout == "HND":
        return shape[0], shape[2], shape[1], shape[3]
    if which == "key":
        if shape[3] % x:
            raise ValueError(
                f"{name} has shape {shape}, page {shape[3]}; accepted for layout SHUFFLE and {dtype_name(pool.dtype)}: "
                f"pages of a multiple of {x} tokens"
            )
        return shape[0], shape[3], shape[1], shape[2] * x
    return shape[0], shape[2] * x, shape[1], shape[3]


def as_nhd(pool: Tensor, layout: str, which: Which) -> Tensor:
    """Return the pool's values as `[blocks, page, heads, dim]`: a view in NHD and HND; in SHUFFLE a copy if joining the
    groups requires one."""
    if layout == "NHD":
        return pool
    if layout == "HND":
        return pool.transpose(1, 2)
    order = (0, 3, 1, 2, 4) if which == "key" else (0, 2, 4, 1, 3)
    grouped = pool.permute(order)
    return grouped.flatten(3, 4) if which == "key" else grouped.flatten(1, 2)


def convert(pool: Tensor, src: str, dst: str, which: Which) -> Tensor:
    """Return a new contiguous pool with the same values in another layout.

    Args:
        pool: a K or V pool in layout `src`; any pool dtype and strides.
        src, dst: "NHD", "HND" or "SHUFFLE".
        which: "key" or "value"; SHUFFLE treats them differently.

    Raises:
        TypeError: `pool` is not a tensor or has no pool dtype.
        ValueError: its shape does not match `src`, or `dst` does not support its sizes.
    """
    check_choice(src, "src", LAYOUTS)
    check_choice(dst, "dst", LAYOUTS)
    check_choice(which, "which", ("key", "value"))
    check_pool(pool, "pool")
    blocks, page, heads, dim = _read_sizes(pool, src, which)
    shape = pool_shape(dst, which, blocks, page, heads, dim, pool.element_size())
    nhd = as_nhd(pool, src, which)
    if dst == "NHD":
        converted = nhd
    elif dst == "HND":
        converted = nhd.transpose(1, 2)
    elif which == "key":
        converted = nhd.unflatten(3, (-1, shape[4])).permute(0, 2, 3, 1, 4)
    else:
        converted = nhd.unflatten(1, (-1, shape[4])).permute(0, 3, 1, 4, 2)
    return converted.clone(memory_format=torch.contiguous_format)


def element_offset(pool: Tensor, layout: str, which: Which, block: int, head: int, slot: int, dim: int) -> int:
    """Return the offset of an element from the pool's first element, in elements.

    Args:
        pool: a K or V pool in `layout`.
        block, head, slot, dim: the element's index; `slot` is the page offset.

    Raises:
        ValueError: an index is outside the pool.
    """
    check_choice(layout, "layout", LAYOUTS)
    check_choice(which, "which", ("key", "value"))
    check_tensor(pool, "pool")
    blocks, page, heads, head_dim = _read_sizes(pool, layout, which)
    limits = {"block": (block, blocks), "head": (head, heads), "slot": (slot, page), "dim": (dim, head_dim)}
    for name, (index, limit) in limits.items():
        check_int(index, name, maximum=limit - 1)
    return PoolStrides.of(pool, layout, which).offset(block, head, slot, dim)


def byte_offset(pool: Tensor, layout: str, which: Which, block: int, head: int, slot: int, dim: int) -> int:
    """Return the offset of an element from the pool's first element, in bytes; see `element_offset`."""
    return element_offset(pool, layout, which, block, head, slot, dim) * pool.element_size()
