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
from kvgather.blocks import BlockPool, OutOfBlocksError, PooledSequence, cu_seqlens

PROMPT = list(range(10))  # blocks 0123, 4567, 89


def snapshot(pool: BlockPool, *seqs: PooledSequence) -> list[Any]:
    """Everything that can be seen of a pool, to compare before and after."""
    return [
        [pool.block(i) for i in range(pool.num_blocks)],
        pool.eviction_order(),
        pool.stats,
        [(list(s.block_ids), list(s.token_ids), s.num_cached_tokens, s.num_computed_tokens) for s in seqs],
    ]


def run_prompt(pool: BlockPool, tokens: list[int], extra_key: Any = None) -> PooledSequence:
    seq = pool.allocate(tokens, extra_key)
    pool.commit(seq)
    return seq


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
    monkeypatch.setattr(blocks.block_keys, "chain_hash", lambda parent_hash, token_ids, extra_key: 7)
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


def test_slots_follow_the_block_table() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    pool.allocate([7])
    seq = pool.allocate(PROMPT)  # blocks 1, 2, 3
    assert pool.slots(seq).tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert pool.slots(seq, 3, 9).tolist() == [7, 8, 9, 10, 11, 12]
    assert pool.slots(seq, 8).tolist() == [12, 13]
    assert pool.slots(seq, 4, 4).tolist() == []
    assert pool.slots(seq, 10).dtype == torch.int64


def test_slots_of_scattered_blocks() -> None:
    pool = BlockPool(num_blocks=4, page_size=3)
    one, two = pool.allocate([1, 2, 3]), pool.allocate([4])
    pool.append(one, 9)
    assert one.block_ids == [0, 2]
    assert pool.slots(one).tolist() == [0, 1, 2, 6]
    assert pool.slots(two).tolist() == [3]


def test_block_table_pads_with_minus_one() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seqs = [pool.allocate(PROMPT), pool.allocate([1])]
    table = pool.block_table(seqs)
    assert table.dtype == torch.int32
    assert table.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert pool.block_table([]).shape == (0, 0)


def test_cu_seqlens() -> None:
    sums = cu_seqlens([3, 0, 5])
    assert sums.dtype == torch.int32
    assert sums.tolist() == [0, 3, 3, 8]
    assert cu_seqlens([]).tolist() == [0]
    with pytest.raises(ValueError, match=r"lengths\[1\] is -2"):
        cu_seqlens([3, -2])
    with pytest.raises(ValueError, match="sum of lengths is 4294967294"):
        cu_seqlens([2**31 - 1, 2**31 - 1])


BAD_DEVICES = [
    ("gpu", ValueError, r"device is 'gpu'; accepted: a torch.device or its name"),
    (3.5, TypeError, r"device is float 3.5; accepted: a torch.device or its name"),
    ("meta", ValueError, r"device is meta, which holds no values; accepted: a GPU, or cpu"),
    ("cuda:99", ValueError, r"device is cuda:99, and torch sees \d+ GPUs here; accepted: one of those, or cpu"),
]


@pytest.mark.parametrize(("device", "error", "message"), BAD_DEVICES)
def test_bad_devices(device: Any, error: type[Exception], message: str) -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    seq = pool.allocate(PROMPT)
    for call in (lambda: pool.slots(seq, device=device), lambda: pool.block_table([seq], device=device)):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message):
        cu_seqlens([1, 2], device)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (5, TypeError, r"lengths is 5; accepted: a list of integers, or an integer tensor \[n\]"),
        (None, TypeError, r"lengths is None; accepted: a list of integers"),
        (["a"], TypeError, r"lengths\[0\] is str 'a'; accepted: an int"),
        (torch.tensor([1, 2], device="meta"), ValueError, r"lengths is on meta, which holds no values; accepted"),
        (torch.tensor([1, 2]).to_sparse(), ValueError, r"lengths has layout torch.sparse_coo; accepted: a dense"),
        (torch.tensor([1.0]), TypeError, r"lengths\[0\] is float 1.0; accepted: an int"),
        (torch.tensor(3), TypeError, r"lengths is 3; accepted: a list of integers"),
    ],
    ids=["int", "none", "str", "meta", "sparse", "float", "scalar"],
)
def test_bad_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cu_seqlens(lengths)


def test_lengths_of_torch_and_numpy() -> None:
    for lengths in (torch.tensor([3, 0, 5]), np.array([3, 0, 5]), iter([3, 0, np.int64(5)])):
        assert cu_seqlens(lengths).tolist() == [0, 3, 3, 8]


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_tables_do_not_follow_the_default_device(default: str) -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seq = pool.allocate(PROMPT)
    with torch.device(default):
        assert pool.slots(seq, 3, 6).tolist() == [3, 4, 5]
        assert pool.block_table([seq]).tolist() == [[0, 1, 2]] and cu_seqlens([2]).tolist() == [0, 2]


def test_tokens_may_come_as_a_tensor_or_an_iterator() -> None:
    pool = BlockPool(num_blocks=16, page_size=4)
    run_prompt(pool, PROMPT)
    assert pool.allocate(torch.tensor(PROMPT, dtype=torch.int32)).num_cached_tokens == 8
    assert pool.allocate(iter(PROMPT)).num_cached_tokens == 8
    assert pool.allocate(torch.tensor(PROMPT).numpy()).num_cached_tokens == 8


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], ValueError, "token_ids is empty; accepted: at least one token"),
        ([1, -5], ValueError, r"token_ids\[1\] is -5; accepted: 0 to"),
        ([2**63], ValueError, r"token_ids\[0\] is 9223372036854775808"),
        ([1.0], TypeError, r"token_ids\[0\] is float"),
        ([True], TypeError, r"token_ids\[0\] is bool"),
        (["a"], TypeError, r"token_ids\[0\] is str"),
        (7, TypeError, "token_ids is 7; accepted: a list of integers"),
        (torch.tensor(7), TypeError, "token_ids is 7; accepted: a list of integers"),
        (torch.tensor([[1, 2]]), TypeError, r"token_ids\[0\] is list"),
        (torch.tensor([0.5]), TypeError, r"token_ids\[0\] is float"),
        (torch.tensor([1], device="meta"), ValueError, "token_ids is on meta, which holds no values; accepted"),
        (torch.tensor([1]).to_sparse(), ValueError, "token_ids has layout torch.sparse_coo; accepted: a dense"),
    ],
)
def test_bad_tokens_raise_and_change_nothing(tokens: Any, error: type[Exception], message: str) -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    before = snapshot(pool)
    with pytest.raises(error, match=message):
        pool.allocate(tokens)
    assert snapshot(pool) == before


def test_bad_extra_key_and_bad_appended_token() -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    with pytest.raises(TypeError, match=r"extra_key is \['a'\]; accepted: any hashable value"):
        pool.allocate([1], ["a"])
    seq = pool.allocate([1, 2, 3, 4])
    before = snapshot(pool, seq)
    for bad, error in [(-1, ValueError), (1.5, TypeError), (None, TypeError)]:
        with pytest.raises(error, match="token_id is"):
            pool.append(seq, bad)
    assert snapshot(pool, seq) == before


@pytest.mark.parametrize("computed", [3, 11, -1])
def test_commit_out_of_range(computed: int) -> None:
    pool = BlockPool(num_blocks=4, page_size=4)
    seq = pool.allocate(PROMPT)
    pool.commit(seq, 4)
    with pytest.raises(ValueError, match=rf"num_computed_tokens is {computed}; accepted: 4 to 10"):
        pool.commit(seq, computed)
    with pytest.raises(TypeError, match="num_computed_tokens is float"):
        pool.commit(seq, 5.0)  # type: ignore[arg-type]


def test_a_view_of_a_block_has_its_number_as_an_int() -> None:
    assert type(BlockPool(4, 4).block(np.int64(2)).block_id) is int


@pytest.mark.parametrize("call", ["append", "commit", "free", "withdraw", "slots", "block_table"])
def test_freed_foreign_and_wrong_sequences_raise(call: str) -> None:
    pool, other = BlockPool(4, 4), BlockPool(4, 4)
    freed, foreign = pool.allocate([1]), other.allocate([1])
    pool.free(freed)

    def use(seq: Any) -> None:
        arguments = {"append": (seq, 1), "block_table": ([seq],)}.get(call, (seq,))
        getattr(pool, call)(*arguments)

    before, name = snapshot(pool), r"seqs\[0\]" if call == "block_table" else "seq"
    with pytest.raises(ValueError, match=f"^{name} was freed already"):
        use(freed)
    with pytest.raises(ValueError, match=f"^{name} belongs to another pool"):
        use(foreign)
    with pytest.raises(TypeError, match=rf"^{name} is a list; accepted: what BlockPool\.allocate returned"):
        use([0])
    assert snapshot(pool) == before


@pytest.mark.parametrize("argument", ["num_blocks", "page_size"])
def test_bad_pool_arguments(argument: str) -> None:
    good = {"num_blocks": 4, "page_size": 4}
    with pytest.raises(ValueError, match=f"{argument} is 0; accepted: 1 to"):
        BlockPool(**{**good, argument: 0})
    with pytest.raises(TypeError, match=f"{argument} is float"):
        BlockPool(**{**good, argument: 4.0})


def test_bad_ranges_and_ids() -> None:
    pool = BlockPool(4, 4)
    seq = pool.allocate(PROMPT)
    with pytest.raises(ValueError, match="end is 11; accepted: 0 to 10"):
        pool.slots(seq, 0, 11)
    with pytest.raises(ValueError, match="start is 6; accepted: 0 to 5"):
        pool.slots(seq, 6, 5)
    with pytest.raises(ValueError, match="block_id is 4; accepted: 0 to 3"):
        pool.block(4)


def test_a_very_long_chain_neither_recurses_nor_slows_down() -> None:
    """Two chains of 60,000 links without a common object: equality and destruction must not recurse.

    In a child process: a recursion that C code takes would end the interpreter and every test with it.
    """
    code = (
        "from kvgather.blocks import BlockPool, _Key\n"
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
