"""Prefix sharing: only blocks of equal content are shared, only computed ones, and a prompt may be fully cached."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch

import kvgather as kg
from kvgather.blocks import OutOfBlocksError
from tests.user_reports.oracle import assert_near, attention, offsets, poisoned, stored

# The wrong block is found: vllm-project/vllm#44701, sgl-project/sglang#24638, openvinotoolkit/openvino.genai#3722.


def test_different_extra_keys_share_no_block() -> None:
    pool = kg.BlockPool(64, 2)
    keys: list[Hashable] = [
        None, "a", "b", ("lora", "a"), ("salt", "a"), ("lora", "salt"), ("a",), b"a", 0, 1, "0", ("lora", "a", None)
    ]  # fmt: skip
    for key in keys:
        seq = pool.allocate([1, 2, 3, 4, 5], key)
        assert seq.num_cached_tokens == 0, key
        pool.commit(seq)
    for key in keys:
        assert pool.allocate([1, 2, 3, 4, 5], key).num_cached_tokens == 4


def test_the_extra_key_applies_to_every_block() -> None:
    pool = kg.BlockPool(16, 2)
    for key in ("x", "y"):
        pool.commit(pool.allocate([1, 2, 3, 4, 5], key))
    x, y = (pool.allocate([1, 2, 3, 4, 5], key) for key in "xy")
    assert not set(x.block_ids) & set(y.block_ids)


def test_prompts_with_equal_hashes_share_no_block() -> None:
    """Python's hash of an integer is its residue modulo 2^61 − 1, so these prompts always collide."""
    step = 2**61 - 1
    assert hash((5, 7)) == hash((5 + step, 7))
    pool = kg.BlockPool(16, 2)
    pool.commit(pool.allocate([5, 7, 1, 2, 9]))
    for other in ([5 + step, 7, 1, 2, 9], [5, 7 + step, 1, 2, 9]):
        assert pool.allocate(other).num_cached_tokens == 0
    assert pool.allocate([5, 7, 1 + step, 2, 9]).num_cached_tokens == 2
    assert pool.allocate([5, 7, 1, 2, 9]).num_cached_tokens == 4


def test_equal_tokens_after_different_prefixes_share_no_block() -> None:
    pool = kg.BlockPool(16, 2)
    pool.commit(pool.allocate([1, 1, 8, 8, 0]))
    assert pool.allocate([2, 2, 8, 8, 0]).num_cached_tokens == 0
    assert pool.allocate([8, 8, 0]).num_cached_tokens == 0


@pytest.mark.triton
@pytest.mark.parametrize("path", ["gather", "direct"])
@pytest.mark.parametrize("length", [4, 8, 9, 12])
def test_a_fully_cached_prompt_gives_the_same_rows(path: str, length: int) -> None:
    """Reported as vllm-project/vllm#11186: a prompt whose tokens are all in the cache."""
    page, blocks = 4, 12
    random = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(length, heads, 16, generator=random) for heads in (4, 2, 2))
    cache = poisoned(kg.PagedKVCache(blocks, page, 2, 16, k_scale=0.02, v_scale=0.02, device="cpu"))
    pool = kg.BlockPool(blocks, page)
    keys, values = (stored(x, 0.02, torch.float8_e4m3fn) for x in (k, v))
    wanted, _ = attention(q, [keys], [values], [length])
    for turn in range(3):
        seq = pool.allocate(list(range(100, 100 + length)))
        cached = seq.num_cached_tokens
        assert cached == (0 if turn == 0 else (length - 1) // page * page)
        batch = kg.PrefixBatch.build(
            pool.block_table([seq]), offsets([length - cached]), offsets([length]), page_size=page, num_blocks=blocks
        )
        assert torch.equal(batch.slots, pool.slots(seq, cached))
        out = kg.prefix_attention(q[cached:], k[cached:], v[cached:], cache, batch, path=path)
        assert_near(out, wanted[cached:], 1e-5)
        pool.commit(seq)
        if turn:
            pool.free(seq)
    assert pool.stats.hit_tokens == 2 * ((length - 1) // page * page)


def test_a_block_is_shared_only_after_it_is_computed() -> None:
    """Reported as vllm-project/vllm#7822 and #7619: a block was found before its K and V were computed."""
    pool = kg.BlockPool(32, 4)
    prompt = list(range(13))
    first, second = pool.allocate(prompt), pool.allocate(prompt)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
    assert not set(first.block_ids) & set(second.block_ids)
    pool.commit(first, 7)  # a chunk that ends within a block
    assert pool.allocate(prompt).num_cached_tokens == 4
    pool.commit(second, 12)  # its first block duplicates a published one; its other blocks are published
    third = pool.allocate(prompt)
    assert third.num_cached_tokens == 12
    assert third.block_ids[:3] == [first.block_ids[0], *second.block_ids[1:3]]
    pool.commit(first)
    pool.free(first)
    pool.free(second)
    assert third.block_ids[:3] == pool.allocate(prompt).block_ids[:3]
    with pytest.raises(ValueError, match="num_computed_tokens"):
        pool.commit(third, 11)


def test_a_request_that_does_not_fit_changes_nothing() -> None:
    pool = kg.BlockPool(4, 2)
    seq = pool.allocate([1, 2, 3, 4, 5])
    pool.commit(seq)
    pool.free(seq)
    before = (pool.eviction_order(), pool.num_free_blocks, pool.stats, [pool.block(i) for i in range(4)])
    with pytest.raises(OutOfBlocksError):
        pool.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9])  # two of the four free blocks are hits, and it needs three others
    assert before == (pool.eviction_order(), pool.num_free_blocks, pool.stats, [pool.block(i) for i in range(4)])
    assert pool.allocate([1, 2, 3, 4, 5, 6, 7, 8]).num_cached_tokens == 4
