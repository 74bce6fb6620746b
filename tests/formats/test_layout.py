"""Layouts: shapes, strides and addresses computed by hand, and conversions in both directions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from kvgather.cases import POOL_STYLES, Case, build
from kvgather.formats.layout import (
    LAYOUTS,
    Geometry,
    PoolStrides,
    Which,
    as_nhd,
    byte_offset,
    convert,
    element_offset,
    key_shape,
    pool_shape,
    value_shape,
)

SIDES: tuple[Which, ...] = ("key", "value")


def counting(layout: str, which: Which, blocks: int, page: int, heads: int, dim: int) -> Tensor:
    """An FP32 pool that holds 0, 1, 2, … in the order of its memory."""
    shape = pool_shape(layout, which, blocks, page, heads, dim, 4)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize(
    ("layout", "itemsize", "key", "value"),
    [
        ("NHD", 1, (5, 48, 3, 80), (5, 48, 3, 40)),
        ("HND", 2, (5, 3, 48, 80), (5, 3, 48, 40)),
        ("SHUFFLE", 1, (5, 3, 5, 48, 16), (5, 3, 3, 40, 16)),
        ("SHUFFLE", 2, (5, 3, 10, 48, 8), (5, 3, 6, 40, 8)),
        ("SHUFFLE", 4, (5, 3, 20, 48, 4), (5, 3, 12, 40, 4)),
    ],
)
def test_shapes(layout: str, itemsize: int, key: tuple[int, ...], value: tuple[int, ...]) -> None:
    assert key_shape(layout, 5, 48, 3, 80, itemsize) == key
    assert value_shape(layout, 5, 48, 3, 40, itemsize) == value


def test_addresses_by_hand() -> None:
    # 2 blocks, page 4, 3 heads, dim 8, 4-byte elements: x is 4, a block is 96 elements.
    place = {"block": 1, "head": 2, "slot": 3, "dim": 5}
    assert element_offset(counting("NHD", "key", 2, 4, 3, 8), "NHD", "key", **place) == 96 + 3 * 24 + 2 * 8 + 5
    assert element_offset(counting("HND", "key", 2, 4, 3, 8), "HND", "key", **place) == 96 + 2 * 32 + 3 * 8 + 5
    key = counting("SHUFFLE", "key", 2, 4, 3, 8)  # [2, 3, 8/4, 4, 4]: dim 5 is element 1 of group 1
    assert element_offset(key, "SHUFFLE", "key", **place) == 96 + 2 * 32 + 1 * 16 + 3 * 4 + 1
    value = counting("SHUFFLE", "value", 2, 4, 3, 8)  # [2, 3, 4/4, 8, 4]: slot 3 is element 3 of group 0
    assert element_offset(value, "SHUFFLE", "value", **place) == 96 + 2 * 32 + 0 * 32 + 5 * 4 + 3
    assert byte_offset(value, "SHUFFLE", "value", **place) == 4 * (96 + 64 + 20 + 3)


@pytest.mark.parametrize(("layout", "which"), list(product(LAYOUTS, SIDES)))
def test_every_element_offset_is_the_flat_index(layout: str, which: Which) -> None:
    blocks, page, heads, dim = 2, 12, 3, 20
    pool = counting(layout, which, blocks, page, heads, dim)
    nhd = as_nhd(pool, layout, which)
    assert nhd.shape == (blocks, page, heads, dim)
    offsets = set()
    for block, slot, head, d in product(range(blocks), range(page), range(heads), range(dim)):
        offset = element_offset(pool, layout, which, block, head, slot, d)
        assert nhd[block, slot, head, d] == offset  # each element of the pool is its own flat index
        offsets.add(offset)
    assert len(offsets) == pool.numel()


@pytest.mark.parametrize(("layout", "style"), list(product(LAYOUTS, POOL_STYLES)))
def test_addresses_follow_the_strides_of_a_view(layout: str, style: str) -> None:
    cache = build(Case(layout=layout, dtype=torch.float32, pool_style=style, page_size=8, lengths=(8,))).cache
    for which, pool in (("key", cache.key_cache), ("value", cache.value_cache)):
        nhd = as_nhd(pool, layout, which)
        for place in ((0, 0, 0, 0), (2, 1, 7, 15), (1, 0, 5, 6)):
            block, head, slot, dim = place
            memory = pool.as_strided((1,), (1,), pool.storage_offset() + element_offset(pool, layout, which, *place))
            assert memory.view(torch.int32).item() == nhd[block, slot, head, dim].view(torch.int32).item()


def test_offsets_of_tensors_of_positions() -> None:
    pool = counting("SHUFFLE", "value", 2, 8, 2, 4)
    slots = torch.arange(8)
    got = PoolStrides.of(pool, "SHUFFLE", "value").offset(slots * 0 + 1, slots * 0, slots, slots * 0 + 2)
    assert got.tolist() == [element_offset(pool, "SHUFFLE", "value", 1, 0, s, 2) for s in range(8)]


@pytest.mark.parametrize(("src", "dst", "which"), list(product(LAYOUTS, LAYOUTS, SIDES)))
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_conversions_keep_every_value_and_round_trip(src: str, dst: str, which: Which, dtype: torch.dtype) -> None:
    itemsize = dtype.itemsize
    shape = pool_shape(src, which, 2, 48, 3, 80, itemsize)
    bits = torch.randint(0, 256, (*shape[:-1], shape[-1] * itemsize), dtype=torch.uint8)
    pool = bits.view(dtype)
    moved = convert(pool, src, dst, which)
    assert moved.shape == pool_shape(dst, which, 2, 48, 3, 80, itemsize)
    assert moved.is_contiguous() and moved.dtype == dtype
    moved_nhd = as_nhd(moved.view(torch.uint8) if itemsize == 1 else moved, dst, which)
    pool_nhd = as_nhd(pool.view(torch.uint8) if itemsize == 1 else pool, src, which)
    assert torch.equal(moved_nhd.contiguous().view(torch.uint8), pool_nhd.contiguous().view(torch.uint8))
    assert torch.equal(convert(moved, dst, src, which).view(torch.uint8), bits)
    moved.view(torch.uint8).zero_()
    assert bool(pool.view(torch.uint8).any())  # `moved` is a copy, even if src equals dst


def test_a_strided_pool_is_converted() -> None:
    pool = counting("NHD", "key", 3, 4, 6, 8)[:, :, 1::2]
    assert torch.equal(convert(pool, "NHD", "HND", "key"), pool.transpose(1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("SHUFFLE", "key", 2, 16, 1, 40, 1),
            r"head_dim is 40; accepted in SHUFFLE with 1-byte elements: multiples of",
        ),
        (("SHUFFLE", "value", 2, 24, 1, 64, 1), r"page_size is 24; accepted .* multiples of 16"),
        (("SHUFFLE", "key", 2, 4, 1, 64, 2), r"page_size is 4; accepted .* multiples of 8"),
        (("nhd", "key", 2, 4, 1, 64, 2), r"layout is 'nhd'; accepted: NHD, HND, SHUFFLE"),
        (("NHD", "k", 2, 4, 1, 64, 2), r"which is 'k'; accepted: key, value"),
    ],
)
def test_invalid_sizes_are_rejected(arguments: tuple[str, Which, int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool_shape(*arguments)


def test_v_of_shuffle_may_have_any_head_dim() -> None:
    assert pool_shape("SHUFFLE", "value", 2, 16, 1, 40, 1) == (2, 1, 1, 40, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_geometry_of_a_pair_of_pools(layout: str) -> None:
    key = torch.empty(key_shape(layout, 5, 32, 3, 80, 2), dtype=torch.bfloat16)
    value = torch.empty(value_shape(layout, 5, 32, 3, 40, 2), dtype=torch.bfloat16)
    g = Geometry.of(key, value, layout)
    assert (g.num_blocks, g.page_size, g.num_kv_heads, g.head_dim, g.v_head_dim) == (5, 32, 3, 80, 40)
    assert (g.layout, g.dtype, g.device, g.x) == (layout, torch.bfloat16, torch.device("cpu"), 8)


def empty(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def short(pool: Tensor) -> Tensor:
    """A pool whose storage is one element too short."""
    pool.untyped_storage().resize_((pool.numel() - 1) * pool.element_size())
    return pool


WRONG_POOLS = {
    "a list": ([[0.0]], empty(2, 4, 1, 8), "NHD", TypeError, r"key_cache is list .*accepted: a torch.Tensor"),
    "None": (empty(2, 4, 1, 8), None, "NHD", TypeError, r"value_cache is NoneType None; accepted"),
    "int8": (empty(2, 4, 1, 8, dtype=torch.int8), empty(2, 4, 1, 8), "NHD", TypeError, r"key_cache has dtype int8"),
    "three axes": (empty(2, 4, 8), empty(2, 4, 1, 8), "NHD", ValueError, r"key_cache has shape \[2, 4, 8\]; accepted"),
    "shuffle in four": (
        empty(2, 16, 1, 16), empty(2, 16, 1, 16), "SHUFFLE", ValueError,
        r"accepted for layout SHUFFLE and float8_e4m3fn: \[blocks, heads, dim/16, page, 16\]",
    ),
    "another x": (
        empty(2, 1, 2, 16, 8), empty(2, 1, 1, 16, 16), "SHUFFLE", ValueError, r"key_cache has shape \[2, 1, 2, 16, 8\]"
    ),
    "a page of 8 in SHUFFLE": (
        empty(2, 1, 1, 8, 16), empty(2, 1, 1, 16, 16), "SHUFFLE", ValueError,
        r"key_cache has shape \[2, 1, 1, 8, 16\], page 8; accepted for layout SHUFFLE and float8_e4m3fn: pages of a",
    ),
    "no heads": (empty(2, 4, 0, 8), empty(2, 4, 0, 8), "NHD", ValueError, r"key_cache has shape \[2, 4, 0, 8\]"),
    "other heads": (
        empty(2, 4, 2, 8), empty(2, 4, 1, 8), "NHD", ValueError, r"value_cache has 2 blocks, page 4, 1 heads; accepted"
    ),
    "other blocks": (empty(2, 4, 2, 8), empty(3, 4, 2, 8), "HND", ValueError, r"value_cache has 3 blocks"),
    "mixed dtypes": (
        empty(2, 4, 1, 8), empty(2, 4, 1, 8, dtype=torch.float16), "NHD", TypeError,
        r"value_cache has dtype float16; accepted: key_cache's, float8_e4m3fn",
    ),
    "codes as bytes": (
        empty(2, 4, 1, 8, dtype=torch.uint8), empty(2, 4, 1, 8), "NHD", TypeError,
        r"key_cache has dtype uint8; accepted: float8_e4m3fn.*; .* bytes: key_cache.view\(torch.float8_e4m3fn\), or",
    ),
    "no values": (
        empty(2, 4, 1, 8).to("meta"), empty(2, 4, 1, 8).to("meta"), "NHD", ValueError,
        r"key_cache is on meta, which holds no values; accepted: a tensor on a GPU or a CPU",
    ),
    "mixed devices": (
        empty(2, 4, 1, 8), empty(2, 4, 1, 8).to("meta"), "NHD", ValueError, r"value_cache is on meta; accepted: cpu"
    ),
    "sparse": (
        torch.zeros(2, 4, 1, 8).to_sparse(), empty(2, 4, 1, 8), "NHD", ValueError, r"key_cache has layout torch.sparse"
    ),
    "past its memory": (
        empty(2, 4, 1, 8), short(empty(2, 4, 1, 8)), "NHD", ValueError,
        r"value_cache with shape .* reaches byte 64 of its memory, which has 63",
    ),
    "no such layout": (empty(2, 4, 1, 8), empty(2, 4, 1, 8), "DHN", ValueError, r"layout is 'DHN'; accepted: NHD"),
    "layout None": (empty(2, 4, 1, 8), empty(2, 4, 1, 8), None, TypeError, r"layout is NoneType None; accepted: NHD"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_POOLS)
def test_invalid_pairs_of_pools_are_rejected(wrong: str) -> None:
    key, value, layout, error, message = WRONG_POOLS[wrong]
    with pytest.raises(error, match=message):
        Geometry.of(key, value, layout)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"block": 2}, r"block is 2; accepted: 0 to 1"),
        ({"head": -1}, r"head is -1; accepted: 0 to 2"),
        ({"slot": 4}, r"slot is 4; accepted: 0 to 3"),
        ({"dim": 8}, r"dim is 8; accepted: 0 to 7"),
    ],
)
def test_positions_outside_the_pool_are_rejected(place: dict[str, int], message: str) -> None:
    pool = counting("HND", "key", 2, 4, 3, 8)
    with pytest.raises(ValueError, match=message):
        element_offset(pool, "HND", "key", **{"block": 0, "head": 0, "slot": 0, "dim": 0, **place})
    with pytest.raises(TypeError, match=r"dim is float 0.0; accepted: an int"):
        element_offset(pool, "HND", "key", 0, 0, 0, 0.0)
