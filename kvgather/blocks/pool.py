"""The block manager of a paged KV cache: block tables, reference counts, prefix sharing and eviction.

A sequence owns a list of blocks, its row of the block table. `commit` publishes a full block with computed K and V
under a key: its tokens, all earlier tokens, and an extra key such as an adapter id. A later prompt with the same prefix
uses the published block instead of computing it again. A freed block keeps its content until the pool reuses the block,
so that a prompt can find a prefix that no live sequence uses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ..device import resolve_device
from ..formats.checks import check_int, described, shown
from .free import FreeBlocks
from .keys import BlockKey
from .offsets import cu_seqlens, number_list

__all__ = ["BlockPool", "BlockView", "OutOfBlocksError", "PoolStats", "PooledSequence", "cu_seqlens"]

_Key = BlockKey  # chapter 01 prints the source of `_lookup`, which has this name


class OutOfBlocksError(ValueError):
    """A request needs more blocks than are free; the pool is unchanged."""


class BlockPool:
    """Allocates blocks to sequences, and shares the computed full blocks of equal prefixes.

    Args:
        num_blocks: blocks in the pool, as in the `PagedKVCache` that the pool manages.
        page_size: tokens per block.

    Raises:
        ValueError, TypeError: `num_blocks` or `page_size` is not a positive integer.

    Source: paged blocks after PagedAttention (Kwon et al., 2023); the hash chain over full blocks is the
    automatic prefix caching of inference engines. Here a hash finds a candidate, and comparing the tokens confirms it.
    """

    def __init__(self, num_blocks: int, page_size: int) -> None:
        self.num_blocks = check_int(num_blocks, "num_blocks", minimum=1)
        self.page_size = check_int(page_size, "page_size", minimum=1)
        self._ref_counts = [0] * self.num_blocks
        self._keys: list[_Key | None] = [None] * self.num_blocks  # the key of each published block
        self._published: dict[_Key, int] = {}
        self._free = FreeBlocks(self.num_blocks)
        self._live: set[PooledSequence] = set()
        self._stats = PoolStats()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence uses, cached or blank."""
        return len(self._free)

    @property
    def stats(self) -> PoolStats:
        """Hits and evictions since the pool was created."""
        return replace(self._stats)

    def allocate(self, token_ids: Iterable[int], extra_key: Hashable = None) -> PooledSequence:
        """Start a sequence: use the cached blocks of its prefix, and take free blocks for the rest.

        Args:
            token_ids: the prompt, at least one integer >= 0 (a list, or an integer tensor [n]).
            extra_key: other inputs of K and V, such as an adapter id. Sequences share blocks only if their keys are
                equal and of one type (1, True and 1.0 are three keys, also inside tuples; NumPy numbers are converted
                to Python's).

        Returns:
            The sequence. The K and V of its first `num_cached_tokens` tokens (a multiple of page_size, never the last
            token) are in the cache; the caller computes and writes the others, then calls `commit`.

        Raises:
            OutOfBlocksError: too few blocks are free.
            ValueError, TypeError: no tokens, invalid tokens, an unhashable extra_key.
        """
        tokens = _checked_tokens(token_ids)
        try:
            hash(extra_key)
        except TypeError:
            raise TypeError(f"extra_key is {shown(extra_key)}; accepted: any hashable value") from None
        content_key = _typed(extra_key)
        hits = self._lookup(tokens, content_key)
        num_new = -(-len(tokens) // self.page_size) - len(hits)
        self._require_free(num_new, reserved=sum(self._ref_counts[block_id] == 0 for block_id in hits))

        for block_id in hits:
            self._free.reuse(block_id)
            self._ref_counts[block_id] += 1
        block_ids = hits + [self._take() for _ in range(num_new)]
        cached = len(hits) * self.page_size
        keys = [self._key_of(block_id) for block_id in hits]
        seq = PooledSequence(tokens, block_ids, cached, cached, extra_key, self, keys, content_key)
        self._live.add(seq)
        self._stats.prompts += 1
        self._stats.prompt_tokens += seq.num_tokens
        self._stats.hit_tokens += seq.num_cached_tokens
        return seq

    def append(self, seq: PooledSequence, token_id: int) -> None:
        """Add one token to a sequence, in a new block if the last block is full.

        Args:
            seq: a live sequence of this pool.
            token_id: an integer >= 0. Call `commit` once its K and V are computed.

        Raises:
            OutOfBlocksError: the sequence needs a new block and none is free.
            ValueError, TypeError: an invalid token, or not a live sequence of this pool.
        """
        self._check_live(seq)
        token = _checked_token(token_id, "token_id")
        if seq.num_tokens % self.page_size == 0:
            self._require_free(1)
            seq.block_ids.append(self._take())
        seq.token_ids.append(token)

    def commit(self, seq: PooledSequence, num_computed_tokens: int | None = None) -> None:
        """Record that tokens of a sequence are in the cache, and publish the sequence's full computed blocks.

        Args:
            seq: a live sequence of this pool.
            num_computed_tokens: number of tokens, from the first one, whose K and V are written; None for all. In a
                chunked prefill it grows from call to call; it never decreases.

        Raises:
            ValueError, TypeError: fewer tokens than an earlier call committed, or more than the sequence has.
        """
        self._check_live(seq)
        total = seq.num_tokens
        requested = total if num_computed_tokens is None else num_computed_tokens
        computed = check_int(requested, "num_computed_tokens", minimum=seq.num_computed_tokens, maximum=total)
        seq.num_computed_tokens = computed
        if seq.withdrawn:
            return
        for i in range(len(seq.keys), computed // self.page_size):
            key = self._next_key(seq.keys, seq.token_ids, i, seq.content_key)
            owner = self._published.setdefault(key, seq.block_ids[i])
            if owner == seq.block_ids[i]:
                self._keys[owner] = key
            # A duplicate block stays private; the blocks after it are chained to the published block's key.
            seq.keys.append(self._key_of(owner))

    def free(self, seq: PooledSequence) -> None:
        """End a sequence. Blocks that no other sequence uses become free; published ones can still be found.

        The sequence's last block is evicted before its first block, because a prefix match starts at the first block.

        Raises:
            ValueError, TypeError: `seq` is not a live sequence of this pool.
        """
        self._check_live(seq)
        self._live.remove(seq)
        for block_id in reversed(seq.block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.release(block_id, cached=self._keys[block_id] is not None)

    def withdraw(self, seq: PooledSequence) -> None:
        """Unpublish the blocks of a sequence whose K and V are wrong.

        This includes the published blocks that follow one of them in another sequence, because they were computed from
        it. The sequence, and every live sequence that uses an unpublished block, keeps its blocks and publishes none
        from now on. Call `withdraw` before `free`.

        Raises:
            ValueError, TypeError: `seq` is not a live sequence of this pool.
        """
        self._check_live(seq)
        seq.withdrawn = True
        wrong_keys = {key for block_id in seq.block_ids if (key := self._keys[block_id]) is not None}
        self._unpublish(self._following(wrong_keys))

    def reset(self) -> None:
        """Unpublish every block, for instance after an update of the weights.

        Live sequences keep their blocks and publish none from now on. `stats` is not reset.
        """
        for seq in self._live:
            seq.withdrawn = True
        self._unpublish(list(self._published.values()))

    def slots(
        self, seq: PooledSequence, start: int = 0, end: int | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The slots of the positions start to end - 1 of a sequence, where their K and V are written.

        Args:
            seq: a live sequence of this pool.
            start: the first position.
            end: one past the last position; None is `seq.num_tokens`.
            device: the device of the result.

        Returns:
            [end - start] int64, each block_id * page_size + offset.

        Raises:
            ValueError, TypeError: not 0 <= start <= end <= num_tokens, not a live sequence of this pool, or no device
                of this machine.
        """
        self._check_live(seq)
        target = resolve_device(device)
        stop = seq.num_tokens if end is None else check_int(end, "end", maximum=seq.num_tokens)
        first = check_int(start, "start", maximum=stop)
        first_block = first // self.page_size
        ids = seq.block_ids[first_block : -(-stop // self.page_size)]
        blocks = torch.tensor(ids, dtype=torch.int64, device="cpu")
        positions = torch.arange(first, stop, dtype=torch.int64, device="cpu") - first_block * self.page_size
        return (blocks[positions // self.page_size] * self.page_size + positions % self.page_size).to(target)

    def block_table(self, seqs: Sequence[PooledSequence], device: torch.device | str = "cpu") -> torch.Tensor:
        """The block table of a batch: the block ids of each sequence, in order.

        Args:
            seqs: live sequences of this pool.
            device: the device of the result.

        Returns:
            [len(seqs), largest number of blocks of a sequence] int32. Entries after a sequence's last block are -1,
            which is no block id.

        Raises:
            ValueError, TypeError: an item is not a live sequence of this pool, or no device of this machine.
        """
        target = resolve_device(device)
        if not isinstance(seqs, Iterable):
            raise TypeError(f"seqs is {described(seqs)}; accepted: sequences of this pool")
        seqs = list(seqs)
        for i, seq in enumerate(seqs):
            self._check_live(seq, f"seqs[{i}]")
        width = max((len(seq.block_ids) for seq in seqs), default=0)
        rows = [seq.block_ids + [-1] * (width - len(seq.block_ids)) for seq in seqs]
        return torch.tensor(rows, dtype=torch.int32, device=target).reshape(len(seqs), width)

    def block(self, block_id: int) -> BlockView:
        """The state of one block, for figures and tests.

        Raises:
            ValueError, TypeError: block_id is not in [0, num_blocks).
        """
        block_id = check_int(block_id, "block_id", maximum=self.num_blocks - 1)
        key, ref_count = self._keys[block_id], self._ref_counts[block_id]
        return BlockView(block_id, ref_count, None if key is None else key.token_ids)

    def eviction_order(self) -> list[int]:
        """Free blocks in the order of their reuse: blank blocks, then cached ones from the least recently used."""
        return list(self._free)

    def _lookup(self, tokens: list[int], extra_key: Hashable) -> list[int]:
        """Published blocks of the longest prefix of `tokens` that does not include the last token."""
        hits: list[int] = []
        keys: list[_Key] = []
        for i in range((len(tokens) - 1) // self.page_size):
            probe = self._next_key(keys, tokens, i, extra_key)
            block_id = self._published.get(probe)
            if block_id is None:
                break
            key = self._key_of(block_id)
            # Equal content, but another object if the parent was evicted and computed again. Now it is the
            # same object, and the next comparison along this chain takes one `is`.
            key.parent = probe.parent
            hits.append(block_id)
            keys.append(key)
        return hits

    def _next_key(self, keys: list[_Key], tokens: list[int], i: int, extra_key: Hashable) -> _Key:
        token_ids = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
        return _Key(keys[-1] if keys else None, token_ids, extra_key)

    def _key_of(self, block_id: int) -> _Key:
        key = self._keys[block_id]
        assert key is not None
        return key

    def _following(self, wrong_keys: set[_Key]) -> list[int]:
        """Published blocks whose chain of keys contains one of `wrong_keys`, including the blocks of `wrong_keys`."""
        follows: dict[int, bool] = {}  # by id() of a key, so that each key is visited once
        for key in self._published:
            visited: list[_Key] = []
            link: _Key | None = key
            while link is not None and id(link) not in follows and link not in wrong_keys:
                visited.append(link)
                link = link.parent
            result = link is not None and follows.get(id(link), True)
            follows.update((id(visited_key), result) for visited_key in visited)
        return [
            block_id for key, block_id in self._published.items() if key in wrong_keys or follows.get(id(key), False)
        ]

    def _unpublish(self, block_ids: list[int]) -> None:
        """Remove the keys of blocks; free blocks become blank, and live sequences with such a block are withdrawn."""
        unpublished = set(block_ids)
        for block_id in unpublished:
            del self._published[self._key_of(block_id)]
            self._keys[block_id] = None
        for seq in self._live:
            seq.withdrawn = seq.withdrawn or not unpublished.isdisjoint(seq.block_ids)
        self._free.make_blank(unpublished)

    def _require_free(self, needed: int, reserved: int = 0) -> None:
        free = self.num_free_blocks - reserved
        if needed > free:
            raise OutOfBlocksError(
                f"{needed} new blocks are needed; {free} of {self.num_blocks} are free: free a sequence first"
            )

    def _take(self) -> int:
        """Take the next free block for a sequence; a cached block is evicted."""
        block_id = self._free.take()
        if (key := self._keys[block_id]) is not None:
            del self._published[key]
            self._keys[block_id] = None
            self._stats.evictions += 1
        self._ref_counts[block_id] = 1
        return block_id

    def _check_live(self, seq: PooledSequence, name: str = "seq") -> None:
        if not isinstance(seq, PooledSequence):
            raise TypeError(f"{name} is a {type(seq).__name__}; accepted: what BlockPool.allocate returned")
        if seq.pool is not self:
            raise ValueError(f"{name} belongs to another pool; accepted: a sequence that this pool allocated")
        if seq not in self._live:
            raise ValueError(f"{name} was freed already; accepted: a sequence that is still in use")


@dataclass(eq=False)
class PooledSequence:
    """One sequence of a pool. Only the pool changes it.

    Attributes:
        token_ids: the tokens of the prompt, and the appended tokens.
        block_ids: the sequence's row of the block table.
        num_cached_tokens: prompt tokens that `allocate` found in the cache.
        num_computed_tokens: tokens whose K and V are in the cache.
        extra_key: the `extra_key` of `allocate`.
        withdrawn: whether the sequence publishes no more blocks.
    """

    token_ids: list[int]
    block_ids: list[int]
    num_cached_tokens: int
    num_computed_tokens: int
    extra_key: Hashable
    pool: BlockPool = field(repr=False)
    keys: list[_Key] = field(repr=False)  # the keys of the computed full blocks
    content_key: Hashable = field(repr=False)  # extra_key together with its types
    withdrawn: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and appended tokens."""
        return len(self.token_ids)


@dataclass
class PoolStats:
    """Counts since the pool was created; a call that raises changes none of them."""

    prompts: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Fraction of the prompt tokens that were found in the cache, 0 to 1."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True)
class BlockView:
    """One block of a pool: the number of sequences that use it, and the tokens of its key if it is published."""

    block_id: int
    ref_count: int
    token_ids: tuple[int, ...] | None

    @property
    def state(self) -> Literal["used", "cached", "blank"]:
        """One of "used" (by a sequence), "cached" (free and published) and "blank" (free and not published)."""
        if self.ref_count:
            return "used"
        return "blank" if self.token_ids is None else "cached"


def _typed(key: Hashable) -> Hashable:
    """A key together with its types: in Python 1 == True == 1.0, but the typed keys of the three differ."""
    if key is None or type(key) is str:
        return key
    if type(key).__module__ == "numpy" and hasattr(key, "item"):
        key = key.item()
    if isinstance(key, tuple):
        return type(key), tuple(_typed(item) for item in key)
    if isinstance(key, frozenset):
        return type(key), frozenset(_typed(item) for item in key)
    return type(key), key


def _checked_tokens(token_ids: Iterable[int]) -> list[int]:
    """The prompt as a list of Python integers, so that equal tokens have equal hashes."""
    tokens = number_list(token_ids, "token_ids")
    for i, token_id in enumerate(tokens):
        if type(token_id) is not int or not 0 <= token_id < 2**63:
            tokens[i] = _checked_token(token_id, f"token_ids[{i}]")
    if not tokens:
        raise ValueError("token_ids is empty; accepted: at least one token")
    return tokens


def _checked_token(token_id: int, name: str) -> int:
    return check_int(token_id, name, maximum=2**63 - 1)
