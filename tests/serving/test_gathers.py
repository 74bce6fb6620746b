"""The gathers of the replay read the engine's strided pools, and the unguarded scale's memory is large enough."""

from __future__ import annotations

import pytest
import torch

from kvgather import PagedKVCache, PrefixBatch
from kvgather.replay.gathers import contiguous_pages, furthest_element, gather_named, scales
from kvgather.serving import Options
from tests.serving.engines import CPU, answers, engine, prompts

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("stopped")]
SCALE = 0.05


def filled(layout: str, num_blocks: int = 64) -> tuple[PagedKVCache, PrefixBatch]:
    """A pool of an engine that has answered a prompt, and a batch of 20 + 5 tokens in three of its blocks."""
    manager = engine(options=Options(layout=layout, k_scale=SCALE, v_scale=SCALE), num_blocks=num_blocks)
    answers(manager, prompts()[:1], 2)
    assert manager.cache is not None
    pool = manager.cache.layer_pool(1)
    codes = pool.key_cache.view(torch.uint8).flatten(1).any(1).nonzero().flatten()
    a, b, c = codes[:3].tolist()
    offsets = torch.tensor([0, 20, 25], dtype=torch.int32)
    table = torch.tensor([[a, b], [c, -1]], dtype=torch.int32)
    batch = PrefixBatch.build(table, offsets, offsets, page_size=16, num_blocks=pool.geometry.num_blocks)
    return pool, batch


@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
def test_the_shipped_fix_reads_what_ours_reads(layout: str) -> None:
    pool, batch = filled(layout)
    gather = gather_named("shipped-fix")
    assert gather is not None
    key, value = gather(pool, batch, torch.float32)
    ours = pool.gather(batch.everything.plan, out_dtype=torch.float32)
    assert key.abs().max() > 1 and torch.equal(key, ours[0]) and torch.equal(value, ours[1])


def test_before_the_fix_only_the_scale_is_wrong() -> None:
    """The unguarded scale's next values take the place of the scale: each token's row is off by one factor."""
    pool, batch = filled("NHD")
    g = pool.geometry
    both = scales(SCALE, False, furthest_element(64, 16, 2, 1), CPU)
    silent = PagedKVCache.from_tensors(
        pool.key_cache, pool.value_cache, layout="NHD", k_scale=both[0], v_scale=both[1], k_kind="per-tensor",
        v_kind="per-tensor",
    )  # fmt: skip
    gather = gather_named("before")
    assert gather is not None
    key, _ = gather(silent, batch, torch.float32)
    right, _ = pool.gather(batch.everything.plan, out_dtype=torch.float32)
    pages, stride = contiguous_pages(pool.key_cache)
    assert stride == 2 and pages.is_contiguous(), (
        "the layer's group has one layer, and a block a page of K and one of V"
    )
    memory = torch.empty(0).set_(both[0].untyped_storage())
    for token, (block, slot) in enumerate([(0, i) for i in range(16)] + [(1, i) for i in range(4)]):
        page = int(batch.block_table[0, block]) * stride
        torch.testing.assert_close(key[token], right[token] / SCALE * memory[page * g.num_kv_heads * 16 + slot])


def test_the_memory_after_the_scale_reaches_beyond_the_furthest_read() -> None:
    for blocks in (64, 256):
        pool, _ = filled("NHD", blocks)
        pages, _ = contiguous_pages(pool.key_cache)
        reach = len(pages) * pool.geometry.num_kv_heads * pool.geometry.page_size
        assert reach <= furthest_element(blocks, 16, 2, 1) < 5 * reach


def test_the_scale_is_one_element_with_and_without_a_guard() -> None:
    for guard in (False, True):
        k_scale, v_scale = scales(SCALE, guard, 100, CPU)
        assert k_scale.shape == v_scale.shape == (1,) and k_scale.item() == v_scale.item() == pytest.approx(SCALE)
    assert scales(SCALE, False, 100, CPU)[0].untyped_storage().nbytes() == 400


def test_ours_needs_no_gather_and_other_pools_are_refused() -> None:
    assert gather_named("after") is None
    pool = torch.zeros(4, 16, 3, 8).transpose(1, 2)
    with pytest.raises(ValueError, match=r"the pool has strides \[384, 8, 24, 1\]; accepted: contiguous pages"):
        contiguous_pages(pool)
