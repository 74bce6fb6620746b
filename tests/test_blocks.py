"""The block pool, example by example: every number here can be worked out on paper with pages of 4 tokens."""

from __future__ import annotations

import subprocess
import sys
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from kvgather import blocks
from kvgather.blocks import BlockPool, OutOfBlocksError
from tests.prompts import PROMPT, run_prompt, snapshot


def test_first_prompt_takes_fresh_blocks_in_order() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seq = pool.allocate(PROMPT)
    assert seq.block_ids == [0, 1, 2]
    assert (seq.num_cached_tokens, seq.num_computed_tokens, seq.num_tokens) == (0, 0, 10)
    assert pool.num_free_blocks == 5
    assert [pool.block(i).state for i in range(4)] == ["used", "used", "used", "blank"]


def test_equal_prefix_shares_full_computed_blocks_only() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    first = run_prompt(pool, PROMPT)
    second = pool.allocate([*PROMPT[:8], 50, 51])
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] not in first.block_ids
    assert (second.num_cached_tokens, second.num_computed_tokens) == (8, 8)
    assert [pool.block(i).ref_count for i in second.block_ids] == [2, 2, 1]


def test_nothing_is_shared_before_it_is_computed() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    pool.allocate(PROMPT)
    assert pool.allocate(PROMPT).num_cached_tokens == 0


def test_chunked_prefill_shares_what_is_computed_so_far() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    first = pool.allocate(PROMPT)
    pool.commit(first, 3)
    assert pool.allocate(PROMPT).num_cached_tokens == 0
    pool.commit(first, 7)
    second = pool.allocate(PROMPT)
    assert second.num_cached_tokens == 4
    pool.commit(first, 10)
    assert pool.allocate(PROMPT).num_cached_tokens == 8
    assert second.block_ids[1] != first.block_ids[1]  # what a sequence has already taken does not change under it


@pytest.mark.parametrize(("length", "cached"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_hit_never_covers_the_last_token(length: int, cached: int) -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    run_prompt(pool, list(range(length)))
    assert pool.allocate(list(range(length))).num_cached_tokens == cached


def test_a_block_is_its_tokens_and_everything_before_them() -> None:
    pool = BlockPool(num_blocks=16, page_size=2)
    run_prompt(pool, [1, 2, 3, 4, 5, 6])
    assert pool.allocate([1, 2, 3, 4, 9]).num_cached_tokens == 4
    assert pool.allocate([9, 9, 3, 4, 5, 6, 7]).num_cached_tokens == 0  # equal blocks after another beginning


def test_extra_key_separates_adapters() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    run_prompt(pool, PROMPT, "adapter-a")
    assert pool.allocate(PROMPT, "adapter-b").num_cached_tokens == 0
    assert pool.allocate(PROMPT).num_cached_tokens == 0
    assert pool.allocate(PROMPT, "adapter-a").num_cached_tokens == 8


def test_duplicate_of_a_published_block_stays_private() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    first, second = pool.allocate(PROMPT), pool.allocate(PROMPT)
    pool.commit(first)
    pool.commit(second)
    assert second.block_ids == [3, 4, 5]
    assert [pool.block(i).token_ids is None for i in first.block_ids] == [False, False, True]
    assert [pool.block(i).token_ids is None for i in second.block_ids] == [True, True, True]
    assert pool.allocate(PROMPT).block_ids[:2] == first.block_ids[:2]
    pool.free(second)
    assert [pool.block(i).state for i in [3, 4, 5]] == ["blank"] * 3


def test_chain_goes_on_after_a_private_duplicate() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    first, second = pool.allocate(PROMPT[:5]), pool.allocate([*PROMPT, 10, 11, 12])
    pool.commit(first)
    pool.commit(second)  # its block 0 is a duplicate of first's, its blocks 1 and 2 are new
    third = pool.allocate([*PROMPT, 10, 11, 12])
    assert third.block_ids[:3] == [first.block_ids[0], second.block_ids[1], second.block_ids[2]]


def test_append_fills_the_last_block_then_opens_a_new_one() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seq = pool.allocate([1, 2, 3])
    pool.append(seq, 4)
    assert seq.block_ids == [0]
    pool.append(seq, 5)
    assert (seq.block_ids, seq.token_ids, seq.num_tokens) == ([0, 1], [1, 2, 3, 4, 5], 5)
    assert seq.num_computed_tokens == 0


def test_append_to_a_shared_full_block_opens_a_new_one() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    first = run_prompt(pool, PROMPT[:8])
    second = pool.allocate(PROMPT[:9])
    assert second.block_ids[:2] == first.block_ids
    pool.append(first, 99)
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[2] != second.block_ids[2]
    assert pool.block(first.block_ids[2]).ref_count == 1


def test_generated_tokens_can_be_shared_too() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seq = run_prompt(pool, [1, 2, 3])
    for token in [4, 5]:
        pool.append(seq, token)
        pool.commit(seq)
    assert pool.allocate([1, 2, 3, 4, 5, 6]).num_cached_tokens == 4


def test_freed_blocks_are_found_again() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seq = run_prompt(pool, PROMPT)
    pool.free(seq)
    assert pool.num_free_blocks == 8
    assert [pool.block(i).state for i in seq.block_ids] == ["cached", "cached", "blank"]
    assert pool.allocate(PROMPT).num_cached_tokens == 8
    assert pool.num_free_blocks == 5


def test_eviction_takes_blank_then_the_least_recently_used_and_a_chain_from_its_end() -> None:
    pool = BlockPool(num_blocks=5, page_size=4)
    old = run_prompt(pool, [1] * 8)  # blocks 0, 1
    new = run_prompt(pool, [2] * 8)  # blocks 2, 3
    pool.free(old)
    pool.free(new)
    assert pool.eviction_order() == [4, 1, 0, 3, 2]
    pool.free(pool.allocate([1] * 8))  # uses block 0 again, and blank 4 for its last block: 0 is now the youngest
    assert pool.eviction_order() == [4, 1, 3, 2, 0]
    pool.allocate([3] * 12)
    assert [pool.block(i).state for i in range(5)] == ["cached", "used", "cached", "used", "used"]
    assert pool.stats.evictions == 2
    assert pool.allocate([1] * 5).num_cached_tokens == 4


def test_a_hit_is_never_evicted_for_the_same_prompt() -> None:
    pool = BlockPool(num_blocks=3, page_size=4)
    pool.free(run_prompt(pool, PROMPT[:8]))  # blocks 0, 1 are cached, 2 is blank
    seq = pool.allocate(PROMPT[:9])
    assert seq.block_ids == [0, 1, 2]
    with pytest.raises(OutOfBlocksError):
        pool.allocate([7])


def test_child_is_found_again_after_its_parent_was_evicted_and_recomputed() -> None:
    pool = BlockPool(num_blocks=9, page_size=2)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    first, twin = pool.allocate(tokens[:2]), pool.allocate(tokens)
    pool.commit(first)
    pool.commit(twin)  # its block of [1, 2] is a private duplicate, [3, 4] and [5, 6] are published
    filler = pool.allocate([8] * 8)
    pool.free(first)
    pool.append(filler, 8)  # nothing else is free, so the published [1, 2] is evicted
    assert pool.stats.evictions == 1
    pool.free(filler)
    assert pool.allocate(tokens[:3]).num_cached_tokens == 0  # a chain is found from its beginning or not at all
    again = run_prompt(pool, tokens[:2])
    found = pool.allocate(tokens)
    assert found.block_ids[:3] == [again.block_ids[0], twin.block_ids[1], twin.block_ids[2]]


def test_out_of_blocks_leaves_the_pool_as_it_was() -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    pool.free(run_prompt(pool, PROMPT[:8]))  # 0, 1 cached
    seq = run_prompt(pool, [20, 21, 22, 23])  # 2
    before = snapshot(pool, seq)
    with pytest.raises(OutOfBlocksError, match="3 new blocks are needed; 2 of 4 are free"):
        pool.allocate([*PROMPT[:4], *range(30, 39)])  # one hit, which is itself one of the 3 free blocks
    assert snapshot(pool, seq) == before
    hog = pool.allocate(range(40, 52))
    before = snapshot(pool, seq, hog)
    with pytest.raises(OutOfBlocksError, match="1 new blocks are needed; 0 of 4 are free"):
        pool.append(seq, 24)
    assert snapshot(pool, seq, hog) == before
    assert issubclass(OutOfBlocksError, ValueError)


def test_a_hash_collision_never_shares_wrong_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.keys, "chain_hash", lambda parent_hash, token_ids, extra_key: 7)
    pool = BlockPool(num_blocks=32, page_size=2)
    run_prompt(pool, [1, 2, 3, 4, 5], "a")
    assert pool.allocate([3, 4, 1, 2, 5], "a").num_cached_tokens == 0
    assert pool.allocate([9, 9, 3, 4, 5], "a").num_cached_tokens == 0
    assert pool.allocate([1, 2, 9, 9, 5], "a").num_cached_tokens == 2
    assert pool.allocate([1, 2, 3, 4, 5], "b").num_cached_tokens == 0
    assert pool.allocate([1, 2, 3, 4, 5], "a").num_cached_tokens == 4


class Color(IntEnum):
    RED = 1


KEYS: list[Any] = [
    None, True, 1, 1.0, 1 + 0j, "1", b"1", Fraction(1), (1,), (True,), (1.0,), ((1,),), ((True,),), frozenset({1}),
    frozenset({True}), Color.RED, (int, 1), False, 0, 0.0, "", (), (None,),
]  # fmt: skip


def test_equal_keys_of_different_types_share_nothing() -> None:
    pool = BlockPool(num_blocks=256, page_size=2)
    for key in KEYS:
        assert run_prompt(pool, [1, 2, 3], key).num_cached_tokens == 0, key
    for key in KEYS:
        again = pool.allocate([1, 2, 3], key)
        assert again.num_cached_tokens == 2 and again.extra_key is key


def test_a_key_of_numpy_is_pythons() -> None:
    pool = BlockPool(num_blocks=64, page_size=2)
    for key, same in ((7, np.int64(7)), (7.5, np.float64(7.5)), (True, np.bool_(True)), (("a", 7), ("a", np.int32(7)))):
        run_prompt(pool, [1, 2, 3], key)
        assert pool.allocate([1, 2, 3], same).num_cached_tokens == 2
    assert pool.allocate([1, 2, 3], np.int64(1)).num_cached_tokens == 0  # which is not True


def test_withdrawn_blocks_are_found_no_more() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    bad, other = run_prompt(pool, PROMPT), run_prompt(pool, [9, 9, 9, 9, 9])
    freed = run_prompt(pool, [*PROMPT[:8], 7, 7, 7, 7, 7])  # published after the bad ones, computed from them
    after = freed.block_ids[2]
    pool.free(freed)
    pool.withdraw(bad)
    assert pool.allocate(PROMPT).num_cached_tokens == 0
    assert pool.allocate([9, 9, 9, 9, 9]).num_cached_tokens == 4
    assert pool.block(after).state == "blank" and [pool.block(b).token_ids for b in bad.block_ids] == [None] * 3
    assert bad.withdrawn and not other.withdrawn


def test_what_follows_withdrawn_blocks_is_not_found_after_they_were_computed_again() -> None:
    pool = BlockPool(num_blocks=32, page_size=4)
    bad = run_prompt(pool, PROMPT)
    reader = run_prompt(pool, [*PROMPT[:8], 7, 7, 7, 7, 7])  # its first two blocks are the bad ones
    pool.withdraw(bad)
    good = run_prompt(pool, PROMPT)
    assert pool.allocate([*PROMPT[:8], 7, 7, 7, 7, 7]).num_cached_tokens == 8
    for seq in (bad, reader):
        for token in range(8):
            pool.append(seq, token)
        pool.commit(seq)
        assert seq.num_computed_tokens == seq.num_tokens and seq.withdrawn
        assert pool.allocate([*seq.token_ids, 0]).num_cached_tokens == 8  # the good ones, and nothing after them
    pool.free(bad)
    pool.free(reader)
    assert pool.allocate(PROMPT).block_ids[:2] == good.block_ids[:2]


def test_a_private_copy_of_a_withdrawn_block_goes_on() -> None:
    """Two sequences computed the same block at once: the copy read nothing of the bad one."""
    pool = BlockPool(num_blocks=16, page_size=4)
    bad, copy = pool.allocate(PROMPT), pool.allocate(PROMPT)
    pool.commit(bad)
    pool.commit(copy)
    pool.withdraw(bad)
    assert not copy.withdrawn
    assert pool.allocate(PROMPT).num_cached_tokens == 0


def test_reset_finds_nothing_and_live_sequences_go_on() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    live = run_prompt(pool, PROMPT)
    pool.free(run_prompt(pool, [9, 9, 9, 9, 9]))
    stats = pool.stats
    pool.reset()
    assert pool.stats == stats and pool.num_free_blocks == 13
    assert all(pool.block(b).token_ids is None for b in range(16))
    assert pool.allocate([9, 9, 9, 9, 9]).num_cached_tokens == 0
    pool.append(live, 10)
    pool.append(live, 11)
    pool.commit(live)  # computed with the old weights
    assert pool.allocate([*live.token_ids, 1]).num_cached_tokens == 0
    new = run_prompt(pool, PROMPT)
    assert pool.allocate(PROMPT).block_ids[:2] == new.block_ids[:2]
    pool.reset()
    pool.reset()
    assert pool.allocate(PROMPT).num_cached_tokens == 0


def test_stats_count_prompt_tokens_and_hits() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    assert pool.stats.hit_rate == 0.0
    run_prompt(pool, PROMPT)
    before = pool.stats
    pool.allocate(PROMPT)
    assert (pool.stats.prompts, pool.stats.prompt_tokens, pool.stats.hit_tokens) == (2, 20, 8)
    assert pool.stats.hit_rate == pytest.approx(0.4)
    assert before.prompts == 1  # a reading, not a live view


def test_tokens_may_come_as_a_tensor_or_an_iterator() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    run_prompt(pool, PROMPT)
    assert pool.allocate(torch.tensor(PROMPT, dtype=torch.int32)).num_cached_tokens == 8
    assert pool.allocate(iter(PROMPT)).num_cached_tokens == 8
    assert pool.allocate(torch.tensor(PROMPT).numpy()).num_cached_tokens == 8


def test_a_view_of_a_block_has_its_number_as_an_int() -> None:
    assert type(BlockPool(4, 4).block(np.int64(2)).block_id) is int


def test_a_very_long_chain_neither_recurses_nor_slows_down() -> None:
    """Two chains of 60,000 links without a common object: equality and destruction must not recurse.

    In a child process: a recursion that C code takes would end the interpreter and every test with it.
    """
    code = (
        "from kvgather.blocks import BlockPool\n"
        "from kvgather.blocks.keys import BlockKey as _Key\n"
        "def chain():\n"
        "    key = None\n"
        "    for i in range(60_000):\n"
        "        key = _Key(key, (i,), None)\n"
        "    return key\n"
        "a, b = chain(), chain()\n"
        "assert a == b and a.parent != b\n"
        "del a, b\n"
        "pool = BlockPool(num_blocks=60_001, page_size=1)\n"
        "seq = pool.allocate(range(60_000)); pool.commit(seq); pool.free(seq)\n"
        "assert pool.allocate(range(60_000)).num_cached_tokens == 59_999\n"
        "pool.reset()\n"
        "pool = BlockPool(num_blocks=60_001, page_size=1)\n"
        "seq = pool.allocate(range(60_000)); pool.commit(seq); pool.withdraw(seq)\n"
        "assert pool._published == {}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
