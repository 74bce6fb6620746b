"""The cache: what an empty one is, what it refuses, writes that are like one before, and memory that was replaced."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import kvgather as kg
from tests.where import interpreted

FP8 = torch.float8_e4m3fn
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


def uses(cache: kg.PagedKVCache) -> dict[str, Callable[[], Any]]:
    """Every call that reads or writes the cache's memory."""
    table, ends = torch.arange(8, dtype=torch.int32)[None], torch.tensor([0, 30]).int()
    plan = kg.GatherPlan.build(table, ends, page_size=4, num_blocks=8, total_tokens=30)
    batch = kg.PrefixBatch.build(table, torch.tensor([0, 1]).int(), ends, page_size=4, num_blocks=8)
    q = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    row, slots = torch.ones(1, 2, 16), torch.tensor([31])
    calls: dict[str, Callable[[], Any]] = {}
    for backend in ("torch", "triton"):
        calls[f"gather, {backend}"] = partial(cache.gather, plan, backend=backend)
        calls[f"write, {backend}"] = partial(cache.write, row, row.clone(), slots, backend=backend)
    for path in ("gather", "direct"):
        calls[path] = partial(kg.prefix_attention, q, None, None, cache, batch, path=path)
    return calls


@interpreted
@pytest.mark.parametrize("known", [False, True], ids=["at first", "after a call"])
@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("k_scale", torch.tensor([0.5]), r"k_scale has shape \[1\]; accepted for 2 heads, 8 blocks, page 4"),
        ("v_scale", torch.ones(2).double(), r"v_scale has dtype float64; accepted: float32"),
        ("key_cache", torch.zeros(2, 4, 2, 16).to(FP8), r"value_cache has 8 blocks.* accepted: .* 2 blocks"),
        ("key_cache", torch.zeros(8, 4, 2, 8).to(FP8), r"are .*head_dim=8.*; accepted: .*head_dim=16"),
        ("key_cache", torch.zeros(8, 4, 2, 16).bfloat16(), r"value_cache has dtype float8_e4m3fn; accepted: key"),
    ],
    ids=["one-element scale", "scale's dtype", "fewer blocks", "smaller head dim", "pool's dtype"],
)  # fmt: skip
def test_memory_of_another_kind_is_refused(name: str, other: torch.Tensor, message: str, known: bool) -> None:
    """The bug of this project, by another way: an engine reloads a scale, or wakes a pool, of another form."""
    for use in uses(kg.PagedKVCache(8, 4, 2, 16, scale="per-head", device="cpu")):
        cache = kg.PagedKVCache(8, 4, 2, 16, scale="per-head", device="cpu")
        call = uses(cache)[use]
        if known:
            call()
        getattr(cache, name).data = other
        with pytest.raises((TypeError, ValueError), match=message):
            call()
        with pytest.raises((TypeError, ValueError), match=message):  # again
            call()


@interpreted
def test_a_scale_with_other_strides_is_read_by_them() -> None:
    cache = kg.PagedKVCache(8, 4, 2, 16, scale="per-token-head", device="cpu")
    cache.write(*torch.randn(2, 32, 2, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32))
    calls = {name: call for name, call in uses(cache).items() if "write" not in name}
    before = {name: call() for name, call in calls.items()}
    for scale in (cache.k_scale, cache.v_scale):
        assert scale is not None
        scale.data = scale.transpose(1, 2).contiguous().transpose(1, 2)
    for name, call in calls.items():
        for ours, theirs in zip(call(), before[name], strict=True):
            assert torch.equal(ours, theirs), name


@interpreted
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_memory_and_launches_of_its_own(copied: Callable[[kg.PagedKVCache], kg.PagedKVCache]) -> None:
    cache = kg.PagedKVCache(8, 4, 2, 16, dtype=torch.float32, scale="none", device="cpu")  # torch does not unpickle FP8
    for call in uses(cache).values():
        call()
    before = cache.key_cache.view(torch.uint8).clone()
    other = copied(cache)
    assert torch.equal(other.key_cache.view(torch.uint8), before)
    for call in uses(other).values():
        call()
    other.write(torch.randn(1, 2, 16) + 9, torch.randn(1, 2, 16), torch.tensor([31]), backend="triton")
    assert torch.equal(cache.key_cache.view(torch.uint8), before)
    assert not torch.equal(other.key_cache.view(torch.uint8), before)


@interpreted
def test_two_threads_launch_interpreted_kernels() -> None:
    """Triton's interpreter replaces parts of its language for all threads while a kernel runs."""
    found: list[object] = []

    def gather(seed: int) -> None:
        cache = kg.PagedKVCache(8, 4, 2, 16, device="cpu")
        cache.write(*torch.randn(2, 32, 2, 16, generator=torch.Generator().manual_seed(seed)), torch.arange(32))
        calls = uses(cache)
        expected = calls["gather, torch"]()
        for _ in range(12):
            try:
                got = calls["gather, triton"]()
                found.append(all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)))
            except Exception as error:
                found.append(error)

    filters = list(warnings.filters)
    threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 24 and warnings.filters == filters
