"""The gathers that tests compare with the reference cover every kind, dtype, layout, shape and pool style."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvgather.cases import POOL_STYLES, SHAPES, SMALL, Case, build, empty_pools, fits
from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS, key_shape
from kvgather.formats.scale import KINDS


def test_names_are_unique() -> None:
    assert len({case.name for case in SMALL}) == len(SMALL)
    name = "SHUFFLE-2x16:24-page16-e4m3fn>bfloat16-per-head:none-2seqs7-chunk-spare2-sliced-int64"
    case = Case(
        layout="SHUFFLE", v_dim=24, k_kind="per-head", v_kind="none", lengths=(3, 4), starts=(1, 0), spare_rows=2,
        pool_style="sliced", index_dtype=torch.int64,
    )  # fmt: skip
    assert case.name == name


def test_every_kind_dtype_shape_and_style_is_covered() -> None:
    assert {(case.k_kind, case.v_kind) for case in SMALL} >= set(product(KINDS, KINDS))
    kinds = {(case.dtype, kind) for case in SMALL for kind in (case.k_kind, case.v_kind)}
    assert kinds >= set(product(POOL_DTYPES, KINDS))
    assert {case.dtype for case in SMALL if case.dtype == case.out_dtype} == set(POOL_DTYPES)
    assert torch.bfloat16 in {case.out_dtype for case in SMALL}
    assert {(case.layout, case.pool_style) for case in SMALL} == set(product(LAYOUTS, POOL_STYLES))
    sizes = {(case.layout, case.page_size, case.num_heads, case.k_dim, case.v_dim) for case in SMALL}
    for layout, shape in product(("NHD", "HND"), SHAPES):
        assert (layout, *(shape[name] for name in ("page_size", "num_heads", "k_dim", "v_dim"))) in sizes


def test_shuffle_needs_whole_groups_of_16_bytes() -> None:
    assert fits("SHUFFLE", 16, 32, torch.float8_e4m3fn) and fits("SHUFFLE", 8, 24, torch.float16)
    assert not fits("SHUFFLE", 8, 32, torch.float8_e4m3fn) and not fits("SHUFFLE", 16, 24, torch.float8_e4m3fn)
    assert fits("NHD", 7, 5, torch.float8_e4m3fn)
    assert all(case.fits for case in SMALL)


def test_pages_count_the_blocks_before_a_start() -> None:
    case = Case(page_size=16, lengths=(1, 17, 0), starts=(15, 16, 40), spare_rows=2)
    assert case.pages == (1, 3, 0) and case.total_tokens == 20


def test_the_same_seed_gives_the_same_tensors() -> None:
    first, again, other = (build(Case(k_kind="per-head"), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.cache.key_cache.view(torch.uint8), again.cache.key_cache.view(torch.uint8))
    assert torch.equal(first.block_table, again.block_table) and torch.equal(first.cache.k_scale, again.cache.k_scale)
    assert not torch.equal(first.cache.key_cache.view(torch.uint8), other.cache.key_cache.view(torch.uint8))
    normal = build(Case(k_kind="none", v_kind="none", lengths=(500,)), values="normal")
    assert normal.cache.key_cache.float().std() == pytest.approx(16, rel=0.1)


def test_empty_pools_have_the_cases_layout_and_no_memory_on_meta() -> None:
    for layout in LAYOUTS:
        key, value = empty_pools(Case(layout=layout, v_dim=32), 5, torch.device("meta"))
        assert key.shape == key_shape(layout, 5, 16, 2, 16, 1) and key.is_meta and value.is_meta


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="values is 'ones'; accepted: codes, normal"):
        build(Case(), values="ones")
    with pytest.raises(ValueError, match="pool_style is 'folded'; accepted: contiguous, sliced"):
        build(Case(pool_style="folded"))
