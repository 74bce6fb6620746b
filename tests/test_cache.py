"""The cache: what an empty one is, what it refuses, and writes that are like one before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kvgather as kg
from tests.where import interpreted

GOOD: dict[str, Any] = {"num_blocks": 2, "page_size": 16, "num_kv_heads": 2, "head_dim": 16, "device": "cpu"}


def test_an_empty_cache() -> None:
    cache = kg.PagedKVCache(num_blocks=4, page_size=16, num_kv_heads=2, head_dim=32, v_head_dim=16, device="cpu")
    assert (cache.layout, cache.k_kind, cache.v_kind, cache.num_slots) == ("NHD", "per-tensor", "per-tensor", 64)
    assert cache.k_scale is not None and cache.k_scale.tolist() == [1.0]
    assert cache.key_cache.shape == (4, 16, 2, 32) and cache.value_cache.shape == (4, 16, 2, 16)
    assert repr(cache) == (
        "PagedKVCache(4 blocks × 16 tokens × 2 heads × 32/16, NHD, torch.float8_e4m3fn, per-tensor, cpu)"
    )
    for kind, shape in (("per-head", (2,)), ("per-page-head", (4, 2)), ("per-token-head", (4, 2, 16))):
        scaled = kg.PagedKVCache(4, 16, 2, 32, scale=("none", kind), device="cpu")
        assert scaled.k_scale is None and scaled.v_scale is not None and scaled.v_scale.shape == shape
        assert bool((scaled.v_scale == 1).all())
    assert kg.PagedKVCache(0, 16, 2, 32, scale="per-token-head", device="cpu").num_slots == 0


def test_from_tensors_shares_memory() -> None:
    k, v, scale = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8), torch.ones(2, 1, 4)
    cache = kg.PagedKVCache.from_tensors(k, v, layout="NHD", k_scale=scale, v_scale=0.5)
    assert cache.key_cache is k and cache.value_cache is v and cache.k_scale is scale
    assert (cache.k_kind, cache.v_kind) == ("per-token-head", "per-tensor")
    cache.write(torch.full((1, 1, 8), 3.0), torch.ones(1, 1, 8), torch.tensor([5]))
    assert k[1, 1].tolist() == [[1.0] * 8] and scale[1, 0, 1] == 3.0
    assert v[1, 1].tolist() == [[2.0] * 8]  # divided by the float


def test_check_reads_every_scale() -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, scale="per-token-head", device="cpu")
    cache.check()
    assert cache.v_scale is not None
    cache.v_scale[1, 0, 2] = math.nan
    with pytest.raises(ValueError, match=r"v_scale is nan at \[1, 0, 2\]; accepted: finite values above 0"):
        cache.check()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"num_blocks": -1}, ValueError, r"num_blocks is -1; accepted: 0 to"),
        ({"page_size": 0}, ValueError, r"page_size is 0; accepted: 1 to"),
        (
            {"num_blocks": 2**31 - 1, "page_size": 2**31 - 1},
            ValueError,
            r"num_blocks 2147483647, page_size 2147483647, .* make a pool of 1\.5e\+20 bytes; accepted: fewer than",
        ),
        ({"num_kv_heads": 2.5}, TypeError, r"num_kv_heads is float 2.5; accepted: an int"),
        ({"head_dim": "64"}, TypeError, r"head_dim is str '64'; accepted: an int"),
        ({"v_head_dim": 0}, ValueError, r"v_head_dim is 0; accepted: 1 to"),
        ({"layout": "BHND"}, ValueError, r"layout is 'BHND'; accepted: NHD, HND, SHUFFLE"),
        ({"layout": "SHUFFLE", "page_size": 8}, ValueError, r"page_size is 8; accepted in SHUFFLE"),
        ({"layout": "SHUFFLE", "head_dim": 40}, ValueError, r"head_dim is 40; accepted in SHUFFLE"),
        ({"dtype": torch.int8}, TypeError, r"dtype .*int8.*; accepted: float8_e4m3fn"),
        ({"dtype": "float8_e4m3fn"}, TypeError, r"dtype .*'float8_e4m3fn'; accepted"),
        ({"scale": "per-block"}, ValueError, r"scale is 'per-block'; accepted: none, per-tensor"),
        ({"scale": ("none", "per-row")}, ValueError, r"scale\[1\] is 'per-row'; accepted"),
        ({"scale": ("none",)}, TypeError, r"scale is tuple \('none',\); accepted: a kind, or a pair"),
        ({"scale": None}, TypeError, r"scale is NoneType None; accepted"),
        ({"scale": "none", "k_scale": 1.0}, ValueError, r"k_scale was given; accepted for kind none: None"),
        (
            {"scale": "per-head", "v_scale": torch.ones(3)},
            ValueError,
            r"v_scale has shape \[3\]; .* as per-head: \[2\]",
        ),
        ({"k_scale": -1.0}, ValueError, r"k_scale is -1.0; accepted: finite values above 0"),
        ({"device": "gpu"}, ValueError, r"device is 'gpu'; accepted: a torch.device or its name: cpu, cuda"),
        ({"device": "cuda:77"}, ValueError, r"device is cuda:77, and torch sees \d GPUs here; accepted"),
        ({"device": 1.5}, TypeError, r"device is float 1.5; accepted"),
    ],
)
def test_wrong_sizes(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    kg.PagedKVCache(**GOOD)
    with pytest.raises(error, match=message):
        kg.PagedKVCache(**{**GOOD, **wrong})


@interpreted
@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
def test_a_write_that_is_known_is_the_same(kind: str) -> None:
    """Other rows, lengths and slots go through the launch of an earlier write, and what it holds is theirs."""
    caches = [kg.PagedKVCache(4, 4, 2, 16, layout="HND", scale=kind, device="cpu") for _ in range(2)]
    for turn, tokens in enumerate((3, 5, 1, 3)):
        k, v = torch.randn(2, tokens, 2, 16)
        slots = (torch.randperm(16)[:tokens] - int(turn == 2)).int()
        for cache, backend in zip(caches, ("triton", "torch"), strict=True):
            cache.write(k, v, slots, backend=backend)
        for ours, theirs in ((c.key_cache, d.key_cache) for c, d in [caches]):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert torch.equal(caches[0].value_cache.view(torch.uint8), caches[1].value_cache.view(torch.uint8))
        assert torch.equal(caches[0].v_scale, caches[1].v_scale)
    assert len(caches[0]._write_launches) == 1


@interpreted
def test_a_known_write_drops_no_check() -> None:
    cache = kg.PagedKVCache(4, 4, 2, 16, device="cpu")
    k, v, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([1, 5, 9])
    cache.write(k, v, slots, backend="triton")
    before = cache.key_cache.clone()
    short = torch.randn(3, 2, 16)
    short.untyped_storage().resize_(short.untyped_storage().nbytes() - 1)
    for change, message in (
        ({"k": k[:2]}, r"k, v and slots have 2, 3 and 3 tokens"),
        ({"v": v[:, :1]}, r"v has shape \[3, 1, 16\]; accepted: \[n, 2, 16\]"),
        ({"v": v.int()}, r"v has dtype int32; accepted: bfloat16"),
        ({"k": short}, r"k with shape .* reaches byte"),
        ({"slots": slots.short()}, r"slots has dtype int16; accepted: int32, int64"),
        ({"slots": torch.tensor([1, 16, 2])}, r"slots\[1\] is 16; accepted: below 16"),
        ({"slots": torch.tensor([1, 2, 1])}, r"slots\[0\] and slots\[2\] are both 1"),
        ({"slots": None}, r"slots is NoneType None; accepted: a torch.Tensor"),
        ({"backend": "cuda"}, r"backend is 'cuda'; accepted"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cache.write(**{"k": k * 2, "v": v, "slots": slots, "backend": "triton", **change})
    assert torch.equal(cache.key_cache.view(torch.uint8), before.view(torch.uint8))
    memory = cache.value_cache.untyped_storage()
    memory.resize_(memory.nbytes() - 1)
    with pytest.raises(ValueError, match=r"value_cache with shape .* reaches byte"):
        cache.write(k, v, slots, backend="triton")


@interpreted
def test_a_known_write_goes_where_the_pool_is_now() -> None:
    cache = kg.PagedKVCache(4, 4, 2, 16, dtype=torch.float32, scale="none", device="cpu")
    k, v, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([1, 5, 9])
    cache.write(k, v, slots, backend="triton")
    (known,) = cache._write_launches.values()
    old, new, launch = cache.key_cache.clone(), torch.zeros_like(cache.key_cache), known[0]
    before = torch.empty(0).set_(cache.key_cache)
    cache.key_cache.set_(new)  # an engine that wakes up
    cache.write(k * 2, v, slots, backend="triton")
    assert torch.equal(before, old) and torch.equal(new.view(16, 2, 16)[slots], k * 2)
    (known,) = cache._write_launches.values()
    assert launch not in known  # it has the address of the old memory, to which a GPU would write
