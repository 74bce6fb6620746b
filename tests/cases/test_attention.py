"""The attention cases that tests share: the grid covers every model's shape, and the sinks are what their name says."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvgather.cases import GRID, HEADS, MODELS, PAGES, SINKS, WINDOWS, AttentionCase, sinks_of
from kvgather.formats.layout import LAYOUTS

NAMES = {heads: name for name, heads in HEADS.items()}


def test_the_grid_is_a_full_product() -> None:
    factors = {(NAMES[case.heads], case.page_size, case.window, case.sinks, case.dtype) for case in GRID}
    dtypes = (torch.float8_e4m3fn, torch.bfloat16)
    assert factors == set(product(MODELS, PAGES, WINDOWS, SINKS, dtypes)) and len(factors) == len(GRID)
    assert all(case.fits for case in GRID)
    assert {case.layout for case in GRID} == set(LAYOUTS)
    assert len({case.name for case in GRID}) == len(GRID)
    for pages in PAGES[1:]:
        assert len({case.lengths for case in GRID if case.page_size == pages}) == 4, "every batch on every page size"


def test_a_case_describes_its_cache_and_its_gather() -> None:
    case = AttentionCase(
        q_heads=8, kv_heads=2, head_dim=32, v_head_dim=16, new=(5, 1), cached=(3, 0), layout="HND", window=4
    )
    assert case.name == "8/2x32:16-HND-page16-e4m3fn-per-tensor-window4-5+3,1+0"
    assert case.heads.counts == (8, 2) and case.heads.dims == (32, 16)
    gather = case.gather
    assert (gather.layout, gather.num_heads, gather.k_dim, gather.v_dim) == ("HND", 2, 32, 16)
    assert gather.lengths == case.lengths == (8, 1) and gather.starts == ()
    assert AttentionCase(head_dim=80).heads.dims == (80, 80)


@pytest.mark.parametrize("num_heads", [1, 5])
def test_sinks(num_heads: int) -> None:
    assert sinks_of("off", num_heads) is None
    on = sinks_of("on", num_heads)
    assert on is not None and on.shape == (num_heads,) and on.dtype == torch.float32
    assert on.min() >= -0.5 and on.max() <= 1.5 and len(on.unique()) == num_heads
    for which in ("very large", "very small"):
        assert torch.equal(sinks_of(which, num_heads), torch.full((num_heads,), SINKS[which]))
