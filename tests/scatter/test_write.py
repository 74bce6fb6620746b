"""What a write refuses, on either backend, and what it skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvgather as kg
from kvgather.scatter import SlotError
from tests.gather.oracle import BITS
from tests.scatter.writes import assert_same_contents, contents
from tests.where import interpreted, on_each_device


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_slots_that_a_cpu_refuses(backend: str) -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, device="cpu")
    k = torch.ones(3, 1, 8)
    for slots, message in (
        ([0, 8, -1], r"slots\[1\] is 8; accepted: below 8, the slots of the cache, or negative for padding"),
        ([2**40, 0, 1], r"slots\[0\] is 1099511627776; accepted: below 8"),
        ([5, -1, 5], r"slots\[0\] and slots\[2\] are both 5; accepted: each slot once"),
    ):
        with pytest.raises(SlotError, match=message):
            cache.write(k, k, torch.tensor(slots), backend=backend)
    assert not bool(cache.key_cache.view(torch.uint8).any())
    cache.check()


@on_each_device
def test_padding_is_skipped(where: str) -> None:
    for backend in ("triton", "torch"):
        cache = kg.PagedKVCache(2, 4, 1, 8, scale="per-token-head", device=where)
        k = torch.ones(4, 1, 8, device=where)
        cache.write(k, k, torch.tensor([-1, -1, -(2**31), -5], dtype=torch.int32, device=where), backend=backend)
        cache.write(k[:0], k[:0], torch.tensor([], dtype=torch.int64, device=where), backend=backend)
        assert not bool(cache.key_cache.view(torch.uint8).any() | cache.value_cache.view(torch.uint8).any())
        assert cache.k_scale is not None and bool((cache.k_scale == 1).all())
        cache.check()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"k": torch.ones(2, 2, 16, dtype=torch.int32)},
            TypeError,
            r"k has dtype int32; accepted: bfloat16, float16, fl",
        ),
        ({"k": torch.ones(2, 2, 16).to(torch.float8_e4m3fn)}, TypeError, r"k has dtype float8_e4m3fn; accepted"),
        ({"v": torch.ones(2, 2, 16)}, ValueError, r"v has shape \[2, 2, 16\]; accepted: \[n, 2, 24\]"),
        ({"k": torch.ones(2, 1, 16)}, ValueError, r"k has shape \[2, 1, 16\]; accepted: \[n, 2, 16\]"),
        ({"k": torch.ones(2, 32)}, ValueError, r"k has shape \[2, 32\]; accepted: 3 dimensions"),
        ({"v": None}, TypeError, r"v is NoneType None; accepted: a torch.Tensor"),
        ({"k": torch.ones(3, 2, 16)}, ValueError, r"k, v and slots have 3, 2 and 2 tokens; accepted: equal numbers"),
        ({"slots": torch.tensor([0])}, ValueError, r"k, v and slots have 2, 2 and 1 tokens"),
        ({"slots": [0, 1]}, TypeError, r"slots is list \[0, 1\]; accepted: a torch.Tensor"),
        ({"slots": torch.tensor([0.0, 1.0])}, TypeError, r"slots has dtype float32; accepted: int32, int64"),
        ({"slots": torch.tensor([[0, 1]])}, ValueError, r"slots has shape \[1, 2\]; accepted: 1 dimensions"),
        ({"slots": torch.tensor([0, 1]).to("meta")}, ValueError, r"slots is on meta; accepted: cpu"),
        ({"k": torch.ones(2, 2, 16).to("meta")}, ValueError, r"k is on meta; accepted: cpu"),
        ({"backend": "numpy"}, ValueError, r"backend is 'numpy'; accepted: auto, triton, torch"),
        (
            {"k": torch.ones(0, 2, 16), "v": torch.ones(0, 2, 24), "slots": torch.ones(0, dtype=torch.int32),
             "backend": None},
            TypeError, r"backend is NoneType None; accepted: auto, triton, torch",
        ),
    ],
)  # fmt: skip
def test_wrong_writes(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    cache = kg.PagedKVCache(2, 16, 2, 16, 24, scale="per-token-head", device="cpu")
    before = contents(cache)
    good: dict[str, Any] = {"k": torch.ones(2, 2, 16), "v": torch.ones(2, 2, 24), "slots": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        cache.write(**{**good, **wrong})
    assert_same_contents(contents(cache), before)
    cache.write(**good)
    assert any(bool((a.view(BITS[a.element_size()]) != b.view(BITS[b.element_size()])).any())
               for a, b in zip(contents(cache), before, strict=True))  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_elements_that_lie_on_each_other_can_be_read_and_not_written(backend: str) -> None:
    pool, shared = torch.ones(1, 4, 1, 8), torch.ones(2, 1, 4)
    once = pool.expand(2, 4, 1, 8)
    token = torch.ones(1, 1, 8)
    for tensors, scales, message in (
        ((once, once.clone()), (None, None), r"key_cache has strides \[0, .*; accepted by write: elements that do not"),
        ((once.clone(), once), (None, None), r"value_cache has strides"),
        ((once.clone(), once.clone()), (shared[:1, :, :1].expand(2, 1, 4), None), r"k_scale has strides"),
        ((once.clone(), once.clone()), (shared, shared), r"v_scale shares memory with k_scale; accepted by write: mem"),
        ((shared.view(2, 4, 1, 1), shared.view(2, 4, 1, 1)), (None, None), r"value_cache shares memory with key_cache"),
    ):
        cache = kg.PagedKVCache.from_tensors(*tensors, layout="NHD", k_scale=scales[0], v_scale=scales[1])
        plan = kg.GatherPlan.build(torch.tensor([[1]]), torch.tensor([0, 4]), page_size=4, num_blocks=2)
        assert bool((cache.gather(plan)[0] == 1).all())
        rows = token[..., : cache.geometry.head_dim]
        with pytest.raises(ValueError, match=message):
            cache.write(rows, rows, torch.tensor([0]), backend=backend)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_rows_that_are_a_view_of_the_pool(backend: str) -> None:
    """Tokens that move from slot to slot inside a pool are read before they are written."""
    cache = kg.PagedKVCache(2, 4, 1, 8, dtype=torch.float32, scale="none", device="cpu")
    cache.key_cache.copy_(torch.arange(64.0).view(2, 4, 1, 8))
    for _ in range(2):
        wanted = cache.key_cache.view(8, 1, 8)[:6].clone()
        cache.write(cache.key_cache.view(8, 1, 8)[:6], torch.zeros(6, 1, 8), torch.arange(1, 7), backend=backend)
        assert torch.equal(cache.key_cache.view(8, 1, 8)[1:7], wanted)


def test_pools_and_scales_that_share_memory_in_part() -> None:
    memory = torch.zeros(100)
    k, v, slots = torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.tensor([0])
    pools = [memory[i : i + 32].view(2, 4, 1, 4) for i in (0, 31, 32)]
    with pytest.raises(ValueError, match=r"value_cache shares memory with key_cache; accepted by write"):
        kg.PagedKVCache.from_tensors(pools[0], pools[1], layout="NHD").write(k, v, slots)
    scale = memory[60:68].view(2, 1, 4)
    scale.fill_(1)
    cache = kg.PagedKVCache.from_tensors(pools[0], pools[2], layout="NHD", k_scale=scale)
    with pytest.raises(ValueError, match=r"k_scale shares memory with value_cache; accepted by write"):
        cache.write(k, v, slots)
    packed = memory[:64].view(2, 2, 4, 1, 4)  # K and V of a block side by side
    cache = kg.PagedKVCache.from_tensors(packed[:, 0], packed[:, 1], layout="NHD")
    cache.write(k, v * 2, slots)
    assert packed[0, :, 0].unique().tolist() == [1.0, 2.0]


@pytest.mark.gpu
def test_a_slot_that_comes_twice_is_found_by_check() -> None:
    cache = kg.PagedKVCache(4, 4, 2, 16, device="cuda")
    rows = torch.randn(3, 2, 16, device="cuda")
    cache.write(rows, rows, torch.tensor([1, -1, -1], device="cuda"))
    cache.check()
    cache.write(rows, rows, torch.tensor([1, 2, 1], device="cuda"))
    with pytest.raises(SlotError, match=r"slots\[0\] and slots\[2\] are both 1; accepted: each slot once"):
        cache.check()


@pytest.mark.triton
@pytest.mark.parametrize("row_stride", [16, 3])
def test_a_single_row_is_written_again_without_its_checks(row_stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding one sequence writes one row a layer. Whatever its row stride was, more rows are read by their own."""
    cache, twin = (kg.PagedKVCache(4, 4, 2, 8, dtype=torch.float32, device="cpu") for _ in range(2))
    checked, check = [], kg.PagedKVCache._check_writable

    def counted(self: kg.PagedKVCache) -> None:
        checked.append(self)
        check(self)

    monkeypatch.setattr(kg.PagedKVCache, "_check_writable", counted)
    for slot in range(4):
        k, v = (row.as_strided((1, 2, 8), (row_stride, 8, 1)) for row in torch.randn(2, 1, 2, 8).unbind())
        cache.write(k, v, torch.tensor([slot]), backend="triton")
        twin.write(k, v, torch.tensor([slot]), backend="torch")
    assert checked.count(cache) == 1
    k, v = torch.randn(2, 5, 2, 8).unbind()
    cache.write(k, v, torch.arange(6, 11), backend="triton")
    twin.write(k, v, torch.arange(6, 11), backend="torch")
    assert torch.equal(cache.key_cache, twin.key_cache) and torch.equal(cache.value_cache, twin.value_cache)
