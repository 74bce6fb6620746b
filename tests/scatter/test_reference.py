"""The write in plain torch: what it leaves behind, slot by slot."""

from __future__ import annotations

import pytest
import torch

import kvgather as kg
from kvgather.cases import Case, build
from kvgather.formats.fp8 import FORMATS, computed_scale
from kvgather.formats.layout import LAYOUTS
from tests.scatter.writes import SLOTS, WRITES, assert_same_contents, awkward, contents, obvious_write


@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_a_write_equals_the_obvious_loop(case: Case) -> None:
    k, v = (awkward(4, case.num_heads, dim, "cpu") for dim in (case.k_dim, case.v_dim))
    caches = [build(case, seed=4).cache for _ in range(2)]
    caches[0].write(k, v, torch.tensor(SLOTS), backend="torch")
    obvious_write(caches[1], k, v, SLOTS)
    assert_same_contents(contents(caches[0]), contents(caches[1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_was_written_comes_back_within_half_a_step(layout: str, dtype: torch.dtype) -> None:
    cache = kg.PagedKVCache(3, 16, 2, 32, 16, layout, dtype, "per-token-head", device="cpu")
    k, v = torch.randn(20, 2, 32), torch.randn(20, 2, 16)
    slots = torch.tensor([2 * 16 + i for i in range(16)] + [0, 1, 2, 3])
    cache.write(k, v, slots)
    plan = kg.GatherPlan.build(torch.tensor([[2, 0]]), torch.tensor([0, 20]), page_size=16, num_blocks=3)
    fmt = FORMATS[dtype]
    for got, given in zip(cache.gather(plan, out_dtype=torch.float32), (k, v), strict=True):
        step = 2.0 ** -(fmt.mantissa_bits + 1)
        smallest = fmt.min_normal / 2 ** (fmt.mantissa_bits + 1) * computed_scale(given, dtype)[..., None]
        assert bool(((got - given).abs() <= torch.maximum(given.abs() * step, smallest) * (1 + 1e-6)).all())
        assert bool((got != given).any())


def test_scales_of_written_tokens_are_stored_and_others_stay_one() -> None:
    given = torch.tensor([2.0, 4.0])
    cache = kg.PagedKVCache(2, 4, 2, 8, scale=("per-token-head", "per-head"), v_scale=given, device="cpu")
    k = torch.zeros(1, 2, 8)
    k[0, 0, 3], k[0, 1, 5] = -896.0, 44.8
    cache.write(k, k, torch.tensor([6]))
    assert cache.k_scale is not None and cache.v_scale is not None
    assert cache.k_scale[1, :, 2].tolist() == pytest.approx([2.0, 0.1])
    assert float(cache.k_scale.sum()) == pytest.approx(14 + 2.1)
    assert cache.v_scale.tolist() == [2.0, 4.0]
    assert cache.key_cache[1, 2, 0, 3].item() == -448.0
    assert cache.value_cache[1, 2, :, 5].tolist() == [0.0, 11.0]  # 44.8 / 4, rounded


def test_gradients_do_not_follow_into_the_cache() -> None:
    cache = kg.PagedKVCache(1, 4, 1, 8, dtype=torch.float32, scale="none", device="cpu")
    k = torch.ones(1, 1, 8, requires_grad=True)
    for backend in ("torch", "auto"):
        cache.write(k * 2, k * 2, torch.tensor([0]), backend=backend)
    assert not cache.key_cache.requires_grad
    assert cache.key_cache[0, 0].tolist() == [[2.0] * 8]
