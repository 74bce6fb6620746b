"""The block pool against a slow, obvious twin and a model of memory, through random histories.

The twin stores whole prefixes instead of chains and searches with a loop. The memory records, for every
slot, the tokens that its K and V would be computed from: the whole prefix up to that position. It also numbers the
writes, and stores with each slot the writes it was computed from: nothing computed from a withdrawn one is found.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvgather import blocks
from kvgather.blocks import BlockPool, OutOfBlocksError, PooledSequence

Prefix = tuple[str | None, tuple[int, ...]]


class ObviousPool:
    """What BlockPool must do, without a hash or a chain: lists, loops and whole prefixes."""

    def __init__(self, num_blocks: int, page_size: int) -> None:
        self.page_size = page_size
        self.refs = [0] * num_blocks
        self.content: list[Prefix | None] = [None] * num_blocks
        self.free_ids = list(range(num_blocks))

    def take_order(self) -> list[int]:
        blank = [b for b in self.free_ids if self.content[b] is None]
        return blank + [b for b in self.free_ids if self.content[b] is not None]

    def hits(self, tokens: list[int], extra_key: str | None) -> list[int]:
        found: list[int] = []
        for end in range(self.page_size, len(tokens), self.page_size):
            prefix = (extra_key, tuple(tokens[:end]))
            if prefix not in self.content:
                break
            found.append(self.content.index(prefix))
        return found

    def take(self, count: int, keep: list[int]) -> list[int] | None:
        """`count` free blocks other than those in `keep`, or None when there are too few."""
        taken = [b for b in self.take_order() if b not in keep][:count]
        if len(taken) < count:
            return None
        for b in taken + keep:
            if b in self.free_ids:
                self.free_ids.remove(b)
            self.refs[b] += 1
        for b in taken:
            self.content[b] = None
        return keep + taken

    def publish(self, block_id: int, prefix: Prefix) -> None:
        if prefix not in self.content:
            self.content[block_id] = prefix

    def withdraw(self, block_ids: list[int]) -> set[int]:
        """Forget these blocks' contents and whatever begins like one of them; returns the blocks that had one."""
        bad = [content for b in block_ids if (content := self.content[b]) is not None]
        gone = {
            b
            for b, content in enumerate(self.content)
            if content is not None and any(content[0] == key and content[1][: len(t)] == t for key, t in bad)
        }
        for b in gone:
            self.content[b] = None
        self.free_ids = [b for b in self.free_ids if b not in gone] + [b for b in self.free_ids if b in gone]
        return gone

    def release(self, block_ids: list[int]) -> None:
        for b in reversed(block_ids):
            self.refs[b] -= 1
            if self.refs[b] == 0:
                self.free_ids.append(b)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 12), page_size=st.integers(1, 4))
    def make(self, num_blocks: int, page_size: int) -> None:
        self.pool = BlockPool(num_blocks, page_size)
        self.twin = ObviousPool(num_blocks, page_size)
        self.live: list[PooledSequence] = []
        self.memory: dict[int, Prefix] = {}
        self.origins: dict[int, frozenset[int]] = {}  # of each slot: its own write and those that it was computed from
        self.writes = 0
        self.bad: set[int] = set()  # writes
        self.private: set[PooledSequence] = set()  # sequences that publish nothing

    def snapshot(self) -> list[Any]:
        seqs = [(list(s.block_ids), list(s.token_ids), s.num_computed_tokens) for s in self.live]
        views = [self.pool.block(b) for b in range(self.pool.num_blocks)]
        return [seqs, views, self.pool.eviction_order(), self.pool.stats]

    def prefix(self, seq: PooledSequence, end: int) -> Prefix:
        return (seq.extra_key, tuple(seq.token_ids[:end]))  # type: ignore[return-value]

    # Two tokens and two adapters: equal prefixes are the rule, not the exception.
    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        extra_key=st.sampled_from([None, "adapter"]),
    )
    def allocate(self, tokens: list[int], extra_key: str | None) -> None:
        hits = self.twin.hits(tokens, extra_key)
        expected = self.twin.take(-(-len(tokens) // self.pool.page_size) - len(hits), keep=hits)
        if expected is None:
            before = self.snapshot()
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(tokens, extra_key)
            assert self.snapshot() == before
            return
        seq = self.pool.allocate(tokens, extra_key)
        self.live.append(seq)
        assert seq.block_ids == expected
        assert seq.num_cached_tokens == len(hits) * self.pool.page_size < seq.num_tokens
        for position, slot in enumerate(self.pool.slots(seq, 0, seq.num_cached_tokens).tolist()):
            assert self.memory[slot] == self.prefix(seq, position + 1)
            assert self.bad.isdisjoint(self.origins[slot]), "a block that was computed from a withdrawn one is found"

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        seq = data.draw(st.sampled_from(self.live), label="sequence")
        if seq.num_tokens % self.pool.page_size == 0:
            taken = self.twin.take(1, keep=[])
            if taken is None:
                before = self.snapshot()
                with pytest.raises(OutOfBlocksError):
                    self.pool.append(seq, token)
                assert self.snapshot() == before
                return
            expected = seq.block_ids + taken
        else:
            expected = list(seq.block_ids)
        self.pool.append(seq, token)
        assert seq.block_ids == expected

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute_and_commit(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live), label="sequence")
        start, page_size = seq.num_computed_tokens, self.pool.page_size
        end = data.draw(st.integers(start, seq.num_tokens), label="computed up to")
        for position, slot in zip(range(start, end), self.pool.slots(seq, start, end).tolist(), strict=True):
            written = self.pool.block(slot // page_size)
            assert written.ref_count == 1, "a shared block would be written"
            assert written.token_ids is None, "a published block would be written"
            self.memory[slot] = self.prefix(seq, position + 1)
            before = self.pool.slots(seq, 0, position).tolist()
            self.writes += 1
            self.origins[slot] = frozenset({self.writes}).union(*(self.origins[earlier] for earlier in before))
        self.pool.commit(seq, end)
        for i in range(start // page_size, end // page_size):
            if seq not in self.private:
                self.twin.publish(seq.block_ids[i], self.prefix(seq, (i + 1) * page_size))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live), label="sequence")
        for slot in self.pool.slots(seq, 0, seq.num_computed_tokens).tolist():
            self.bad |= {max(self.origins[slot])}  # the slot's own write
        gone = self.twin.withdraw(seq.block_ids)
        self.private |= {seq, *(other for other in self.live if not gone.isdisjoint(other.block_ids))}
        self.pool.withdraw(seq)

    @precondition(lambda self: self.writes % 5 == 4)
    @rule()
    def reset(self) -> None:
        self.bad |= set(range(self.writes + 1))
        self.twin.withdraw(list(range(self.pool.num_blocks)))
        self.private |= set(self.live)
        self.pool.reset()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live), label="sequence")
        self.live.remove(seq)
        self.pool.free(seq)
        self.twin.release(seq.block_ids)
        with pytest.raises(ValueError, match="freed already"):
            self.pool.free(seq)

    @invariant()
    def no_block_is_lost_or_in_two_places(self) -> None:
        used = {b for seq in self.live for b in seq.block_ids}
        free = self.pool.eviction_order()
        assert len(free) == len(set(free)) == self.pool.num_free_blocks
        assert used.isdisjoint(free)
        assert used | set(free) == set(range(self.pool.num_blocks))
        assert free == self.twin.take_order()

    @invariant()
    def ref_counts_and_contents_are_right(self) -> None:
        for b in range(self.pool.num_blocks):
            view, prefix = self.pool.block(b), self.twin.content[b]
            assert view.ref_count == sum(seq.block_ids.count(b) for seq in self.live) == self.twin.refs[b]
            assert view.token_ids == (None if prefix is None else prefix[1][-self.pool.page_size :])

    @invariant()
    def those_that_publish_nothing_are_known(self) -> None:
        assert all(seq.withdrawn == (seq in self.private) for seq in self.live)

    @invariant()
    def computed_tokens_are_in_memory(self) -> None:
        for seq in self.live:
            for position, slot in enumerate(self.pool.slots(seq, 0, seq.num_computed_tokens).tolist()):
                assert self.memory[slot] == self.prefix(seq, position + 1)

    def teardown(self) -> None:
        for seq in getattr(self, "live", []):
            self.pool.free(seq)
        if hasattr(self, "pool"):
            assert self.pool.num_free_blocks == self.pool.num_blocks


class CollidingPoolMachine(PoolMachine):
    """The same histories when every block has the same hash: only the contents can tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(blocks.keys, "chain_hash", lambda parent_hash, token_ids, extra_key: 7)

    def teardown(self) -> None:
        self.patch.undo()
        super().teardown()


repeatable = settings(
    derandomize=True,
    database=None,
    deadline=None,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPool = PoolMachine.TestCase
TestPool.settings = settings(repeatable, max_examples=60)
TestCollidingPool = CollidingPoolMachine.TestCase
TestCollidingPool.settings = settings(repeatable, max_examples=30)
