"""What surrounds a call changes nothing: default dtype and device, inference mode, autocast, views with a sign bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvgather as kg


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def layer(**changes: Any) -> tuple[Tensor, ...]:
    """Build a cache and a batch, write, gather, attend in each way; all that comes of it."""
    rows = torch.arange(5 * 2 * 16, dtype=torch.float32, device="cpu").view(5, 2, 16).sin()
    q = torch.cat((rows, rows.cos()), 1)
    results: list[Tensor] = []
    for scale in ("per-tensor", "per-token-head"):
        cache = kg.PagedKVCache(6, 4, 2, 16, scale=scale, device="cpu", layout="HND")
        cache.write(rows * 2, rows + 1, torch.tensor([0, 1, 2, 3, 8], device="cpu"))
        table = torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=torch.int32, device="cpu")
        offsets = [torch.tensor(sums, dtype=torch.int32, device="cpu") for sums in ([0, 3, 5], [0, 8, 10])]
        batch = kg.PrefixBatch.build(
            table, *offsets, page_size=4, num_blocks=6, seqlens_q=[3, 2], seqlens_k=[8, 2], windows=(3,)
        )
        plan = kg.GatherPlan.build(table, offsets[1], page_size=4, num_blocks=6, total_tokens=10)
        results += cache.gather(plan, out_dtype=torch.float32)
        for more in (
            {},
            {"workspace_tokens": 4},
            {"window": 3, "sinks": torch.ones(4, device="cpu", dtype=torch.float32)},
        ):
            arguments = {"path": "gather", "return_lse": True, **more, **changes}
            results += kg.prefix_attention(q, rows, rows - 1, cache, batch, **arguments)
        batch.check()
        cache.check()
    return tuple(results)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(name: str) -> None:
    wanted = layer()
    with SURROUNDINGS[name]():
        got = layer()
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.device == theirs.device and torch.equal(ours, theirs)


def test_numpys_numbers_are_numbers() -> None:
    for softmax_scale in (np.float32(0.25), np.float64(0.25), 0.25):
        for ours, theirs in zip(layer(softmax_scale=softmax_scale), layer(softmax_scale=0.25), strict=True):
            assert torch.equal(ours, theirs)
    for scale in (np.float32(0.5), np.int64(1), 1):
        assert kg.PagedKVCache(2, 4, 1, 8, k_scale=scale, device="cpu").k_scale.item() == scale


@pytest.mark.parametrize("given", [1e-60, 10**400, 1e60, float("inf")])
def test_numbers_that_fp32_cannot_hold(given: float) -> None:
    with pytest.raises(ValueError, match=r"softmax_scale is .*; accepted: (values that FP32 can hold|finite values)"):
        layer(softmax_scale=given)


@pytest.mark.parametrize("window", [0, -1])
def test_none_means_no_window(window: int) -> None:
    table, offsets = torch.tensor([[0]]), torch.tensor([0, 1])
    for call, name in (
        (lambda: layer(window=window), "window"),
        (lambda: kg.PrefixBatch.build(table, offsets, offsets, page_size=4, num_blocks=1, windows=[window]),
         r"windows\[0\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} is {window}; accepted: 1 to .*, or None for no window"):
            call()


def negative(tensor: Tensor) -> Tensor:
    """The same values behind a negative bit."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def test_rows_with_a_negative_bit_are_read_with_their_sign() -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, dtype=torch.float32, scale="none", device="cpu")
    offsets = torch.tensor([0, 2])
    batch = kg.PrefixBatch.build(torch.tensor([[1]]), offsets, offsets, page_size=4, num_blocks=2)
    q, k, v = torch.randn(3, 2, 1, 8)
    wanted = kg.prefix_attention(q, k, v, cache, batch, sinks=torch.tensor([0.5]))
    got = kg.prefix_attention(*(negative(t) for t in (q, k, v)), cache, batch, sinks=negative(torch.tensor([0.5])))
    assert torch.equal(got, wanted)
    cache.write(negative(k), negative(v), torch.tensor([0, 1]))
    assert torch.equal(cache.key_cache[0, :2], k) and torch.equal(cache.value_cache[0, :2], v)
    for pool in (cache.key_cache, negative(cache.key_cache)):
        if pool.is_neg():
            with pytest.raises(ValueError, match=r"key_cache has its negative bit set"):
                kg.PagedKVCache.from_tensors(pool, cache.value_cache, layout="NHD")


def test_plans_and_batches_are_equal_to_themselves_alone() -> None:
    offsets = torch.tensor([0, 2])
    build = {"page_size": 4, "num_blocks": 2}
    plans = [kg.GatherPlan.build(torch.tensor([[1]]), offsets, **build) for _ in range(2)]
    batches = [kg.PrefixBatch.build(torch.tensor([[1]]), offsets, offsets, **build) for _ in range(2)]
    for first, second in (plans, batches):
        assert first == first and first != second and len({first, second, first}) == 2


def test_blocks_that_a_window_left_behind_may_be_freed() -> None:
    """An engine frees them and writes -1 into the table, which is legal where every layer has the window."""
    table = torch.tensor([[-1, -1, 2, 3]])
    offsets = torch.tensor([0, 2]), torch.tensor([0, 15])
    batch = kg.PrefixBatch.build(table, *offsets, page_size=4, num_blocks=4)
    batch.check(window=4)  # positions 10 to 14
    for window in (None, 7):  # position 7 is in the second block
        with pytest.raises(kg.PlanError, match=rf"block_table\[0, {0 if window is None else 1}\].* is -1"):
            batch.check(window)
    with pytest.raises(ValueError, match=r"window is 0; accepted: 1 to .*, or None for no window"):
        batch.check(window=0)


def test_the_explanation_counts_what_is_cached() -> None:
    cache = kg.PagedKVCache(4, 4, 1, 8, device="cpu")
    offsets = torch.tensor([0, 1, 2]), torch.tensor([0, 5, 6])
    batch = kg.PrefixBatch.build(
        torch.tensor([[0, 1], [2, 3]]), *offsets, page_size=4, num_blocks=4, seqlens_q=[1, 1], seqlens_k=[5, 1]
    )
    told = batch.explain(cache, 1)
    assert "2 sequences, at most 1 new tokens and 5 tokens; 0 to 4 cached in each; window none" in told
    assert "H100" not in told and "TFLOP" not in told  # nothing measured decided on a CPU
