"""Checks of chapter 03: bytes, loads and layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgather.formats.layout import Which, byte_offset, convert, key_shape, pool_shape
from kvgather.workbook.checks import Wrong, exercise, expect

DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16}


@exercise("03.1", correct="the formula has no number of blocks: an address does not show that a block id is too large")
def hnd_byte(answer: Callable[..., int]) -> None:
    # (blocks, page, heads, dim), then elements of such a pool
    for sizes, itemsize in (((3, 16, 2, 32), 1), ((3, 16, 2, 32), 2), ((4, 10, 3, 24), 2)):
        blocks, page, heads, dims = sizes
        pool = torch.empty(pool_shape("HND", "key", blocks, page, heads, dims, itemsize), dtype=DTYPES[itemsize])
        for place in ((0, 0, 0, 0), (0, 0, 0, 7), (0, 0, 5, 0), (0, 1, 0, 0), (1, 0, 0, 0), (2, 1, 5, 20)):
            block, head, page_offset, dim = place
            got = answer(block, head, page_offset, dim, heads, page, dims, itemsize)
            element = f"block {block}, head {head}, page_offset {page_offset}, dim {dim}"
            pool_text = f"{heads} heads, page {page}, head_dim {dims}, itemsize {itemsize}"
            expect(byte_offset(pool, "HND", "key", *place), got, f"{element} ({pool_text})")


@exercise("03.2", correct="a load of K has dims of one token, a load of V tokens of one dim; 8 elements in BF16")
def elements_of_load(answer: Callable[..., list[tuple[int, int]]]) -> None:
    page, dims = 32, 64
    index = torch.cartesian_prod(torch.arange(page), torch.arange(dims))
    for which, page_offset, dim, itemsize in (
        ("key", 5, 20, 1),
        ("value", 5, 20, 1),
        ("key", 21, 41, 1),
        ("value", 21, 41, 1),
        ("key", 5, 12, 2),
        ("value", 12, 5, 2),
    ):
        # The expected load comes from a pool of numbered elements, not from the formula under test.
        side: Which = "key" if which == "key" else "value"
        numbers = torch.arange(page * dims, dtype=torch.float32).view(1, page, 1, dims)
        x = 16 // itemsize
        split = numbers.unflatten(3, (-1, x)) if side == "key" else numbers.unflatten(1, (-1, x))
        order = (0, 2, 3, 1, 4) if side == "key" else (0, 3, 1, 4, 2)
        memory = split.permute(order).flatten().long()
        start = int((memory == page_offset * dims + dim).nonzero()) // x * x
        expected = [(int(o), int(d)) for o, d in index[memory[start : start + x]].tolist()]
        got = answer(which, page_offset, dim, itemsize)
        expect(expected, got, f"{which}, page_offset {page_offset}, dim {dim}, itemsize {itemsize}")


@exercise("03.3", correct="one view, one permute, and no value changed")
def shuffle_key(answer: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for dtype, sizes in ((torch.float8_e4m3fn, (3, 16, 2, 32)), (torch.bfloat16, (2, 24, 3, 40))):
        shape = key_shape("NHD", sizes[0], sizes[1], sizes[2], sizes[3], dtype.itemsize)
        nhd = torch.randn(shape, generator=generator).to(dtype)
        got = answer(nhd.clone())
        name = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        expect(convert(nhd, "NHD", "SHUFFLE", "key"), got, name)
        if not got.is_contiguous():
            raise Wrong(f"{name}: right values, but the strides are {got.stride()}; the pool must be contiguous")


@exercise("03.4", correct="two pools, without a copy")
def unpack(answer: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    blocks, heads, page, dim = 3, 2, 16, 32
    packed = torch.arange(blocks * heads * 2 * page * dim, dtype=torch.float32).view(blocks, heads, 2, page, dim)
    got = answer(packed)
    for index, name in enumerate(("key_cache", "value_cache")):
        pool = got[index]
        expected = torch.stack([packed[:, :, index, page_offset] for page_offset in range(page)], dim=1)
        expect(expected, pool, name)
        if pool.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr():
            raise Wrong(f"{name} has the right values, but is a copy: a write does not reach the engine's tensor")
