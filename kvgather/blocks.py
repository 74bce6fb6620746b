"""Which block holds which tokens: the book-keeping above a paged KV cache, with no K or V in sight.

A sequence owns a list of blocks, its row of the block table. A full block whose tokens are computed is
published under its content (its tokens, everything before them, and an extra key such as an adapter id), and
the next prompt that begins alike uses the same block instead of computing it again. A freed block keeps its
content until the pool needs the room, so a prefix can be found again long after its last reader has gone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from .device import resolve_device
from .formats.checks import check_int, check_tensor, described, shown


class OutOfBlocksError(ValueError):
    """Raised when a request needs more blocks than are free; the pool is then exactly as it was before."""


class BlockPool:
    """Hands out blocks to sequences and shares the computed full blocks of equal prefixes.

    Args:
        num_blocks: blocks in the pool, as in the `PagedKVCache` that it manages.
        page_size: tokens per block.

    Raises:
        ValueError, TypeError: one of the two is not a positive integer.

    Source: paged blocks after PagedAttention (Kwon et al., 2023); the hash chain over full blocks is the
    automatic prefix caching of inference engines. Here a hash only finds a candidate; its content decides.
    """

    def __init__(self, num_blocks: int, page_size: int) -> None:
        self.num_blocks = check_int(num_blocks, "num_blocks", minimum=1)
        self.page_size = check_int(page_size, "page_size", minimum=1)
        self._ref_counts = [0] * self.num_blocks
        self._keys: list[_Key | None] = [None] * self.num_blocks  # what a block is published as
        self._published: dict[_Key, int] = {}
        self._blank = deque(range(self.num_blocks))  # free, nothing worth keeping
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free but cached, least recently used first
        self._live: set[PooledSequence] = set()
        self._stats = PoolStats()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence uses, cached or blank."""
        return len(self._blank) + len(self._reusable)

    @property
    def stats(self) -> PoolStats:
        """Hits and evictions since the pool was made."""
        return replace(self._stats)

    def allocate(self, token_ids: Iterable[int], extra_key: Hashable = None) -> PooledSequence:
        """Start a sequence: use the cached blocks of its prefix, and take free blocks for the rest.

        Args:
            token_ids: the prompt, at least one integer >= 0 (a list, or an integer tensor [n]).
            extra_key: whatever else K and V depend on, such as an adapter id; only equal keys of one type share
                blocks (1, True and 1.0 are three keys, also inside of tuples; NumPy's numbers are Python's).

        Returns:
            The sequence. Its first `num_cached_tokens` tokens (a multiple of page_size, never the last token)
            are in the cache already; the caller computes and writes the others, then calls `commit`.

        Raises:
            OutOfBlocksError: too few blocks are free.
            ValueError, TypeError: no tokens, bad tokens, an unhashable extra_key.
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
            self._reusable.pop(block_id, None)
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
        """Add one token to a sequence; a full last block is left alone and a new block is opened.

        Args:
            seq: a live sequence of this pool.
            token_id: an integer >= 0. Its K and V are not computed yet: `commit` says when they are.

        Raises:
            OutOfBlocksError: a new block is needed and none is free.
            ValueError, TypeError: a bad token, or not a live sequence of this pool.
        """
        self._check_live(seq)
        token = _checked_token(token_id, "token_id")
        if seq.num_tokens % self.page_size == 0:
            self._require_free(1)
            seq.block_ids.append(self._take())
        seq.token_ids.append(token)

    def commit(self, seq: PooledSequence, num_computed_tokens: int | None = None) -> None:
        """Say which tokens of a sequence are in the cache; its full computed blocks may now be shared.

        Args:
            seq: a live sequence of this pool.
            num_computed_tokens: how many tokens, from the first one on, have their K and V written; all when
                None. In a chunked prefill it grows from call to call; it never shrinks.

        Raises:
            ValueError, TypeError: fewer than were committed before, or more than the sequence has.
        """
        self._check_live(seq)
        given = seq.num_tokens if num_computed_tokens is None else num_computed_tokens
        so_far = seq.num_computed_tokens
        computed = check_int(given, "num_computed_tokens", minimum=so_far, maximum=seq.num_tokens)
        seq.num_computed_tokens = computed
        if seq.withdrawn:
            return
        for i in range(len(seq.keys), computed // self.page_size):
            key = self._next_key(seq.keys, seq.token_ids, i, seq.content_key)
            owner = self._published.setdefault(key, seq.block_ids[i])
            if owner == seq.block_ids[i]:
                self._keys[owner] = key
            # A duplicate stays private, but what follows it is chained to the published twin.
            seq.keys.append(self._key_of(owner))

    def free(self, seq: PooledSequence) -> None:
        """End a sequence; blocks that nobody else uses become free, and the published ones stay findable.

        Its last block is evicted before its first one: a prefix is only of use from its beginning.

        Raises:
            ValueError, TypeError: the sequence is not a live one of this pool.
        """
        self._check_live(seq)
        self._live.remove(seq)
        for block_id in reversed(seq.block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if self._keys[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._reusable[block_id] = None

    def withdraw(self, seq: PooledSequence) -> None:
        """Stop sharing what a sequence holds, for K and V that turned out bad: its published blocks are found no more.

        Neither are blocks that follow them in other sequences, which were computed from them. The sequence and every
        live one that uses a withdrawn block go on with the blocks that they have, and publish nothing from now on.
        Call it before `free`.

        Raises:
            ValueError, TypeError: the sequence is not a live one of this pool.
        """
        self._check_live(seq)
        seq.withdrawn = True
        bad = {key for block_id in seq.block_ids if (key := self._keys[block_id]) is not None}
        self._unpublish(self._following(bad))

    def reset(self) -> None:
        """Start over, for instance after an update of the weights: no block that was published is found any more.

        Live sequences keep their blocks and publish nothing from now on. `stats` goes on counting.
        """
        for seq in self._live:
            seq.withdrawn = True
        self._unpublish(list(self._published.values()))

    def slots(
        self, seq: PooledSequence, start: int = 0, end: int | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Slots of the positions start to end - 1 of a sequence, to write their K and V to.

        Returns:
            [end - start] int64, each block_id * page_size + offset.

        Raises:
            ValueError, TypeError: not 0 <= start <= end <= num_tokens, not a live sequence of this pool, or no device
                of this machine.
        """
        self._check_live(seq)
        where = resolve_device(device)
        last = seq.num_tokens if end is None else check_int(end, "end", maximum=seq.num_tokens)
        first = check_int(start, "start", maximum=last)
        first_block = first // self.page_size
        ids = seq.block_ids[first_block : -(-last // self.page_size)]
        blocks = torch.tensor(ids, dtype=torch.int64, device="cpu")
        positions = torch.arange(first, last, dtype=torch.int64, device="cpu") - first_block * self.page_size
        return (blocks[positions // self.page_size] * self.page_size + positions % self.page_size).to(where)

    def block_table(self, seqs: Sequence[PooledSequence], device: torch.device | str = "cpu") -> torch.Tensor:
        """Block ids of each sequence, in order.

        Returns:
            [len(seqs), most blocks of any of them] int32. Entries past a sequence's own blocks are -1, which
            no reader can mistake for a block.

        Raises:
            ValueError, TypeError: one of them is not a live sequence of this pool, or no device of this machine.
        """
        where = resolve_device(device)
        if not isinstance(seqs, Iterable):
            raise TypeError(f"seqs is {described(seqs)}; accepted: sequences of this pool")
        seqs = list(seqs)
        for i, seq in enumerate(seqs):
            self._check_live(seq, f"seqs[{i}]")
        width = max((len(seq.block_ids) for seq in seqs), default=0)
        rows = [seq.block_ids + [-1] * (width - len(seq.block_ids)) for seq in seqs]
        return torch.tensor(rows, dtype=torch.int32, device=where).reshape(len(seqs), width)

    def block(self, block_id: int) -> BlockView:
        """What the pool knows about one block, for pictures and tests.

        Raises:
            ValueError, TypeError: block_id is not in [0, num_blocks).
        """
        block_id = check_int(block_id, "block_id", maximum=self.num_blocks - 1)
        key, ref_count = self._keys[block_id], self._ref_counts[block_id]
        return BlockView(block_id, ref_count, None if key is None else key.token_ids)

    def eviction_order(self) -> list[int]:
        """Free blocks in the order they will be taken: blank ones, then from the least recently used."""
        return [*self._blank, *self._reusable]

    def _lookup(self, tokens: list[int], extra_key: Hashable) -> list[int]:
        """Published blocks that hold the longest prefix of `tokens`, without its last token."""
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

    def _following(self, bad: set[_Key]) -> list[int]:
        """Published blocks whose chain of keys passes one of `bad`, those of `bad` themselves among them."""
        known: dict[int, bool] = {}  # by the identity of a link, so that each is looked at once
        for key in self._published:
            path: list[_Key] = []
            link: _Key | None = key
            while link is not None and id(link) not in known and link not in bad:
                path.append(link)
                link = link.parent
            verdict = link is not None and known.get(id(link), True)
            known.update((id(passed), verdict) for passed in path)
        return [block_id for key, block_id in self._published.items() if key in bad or known.get(id(key), False)]

    def _unpublish(self, block_ids: list[int]) -> None:
        """Forget what blocks are published as; free ones are blank then, and live sequences that use others flagged."""
        gone = set(block_ids)
        for block_id in gone:
            del self._published[self._key_of(block_id)]
            self._keys[block_id] = None
        for seq in self._live:
            seq.withdrawn = seq.withdrawn or not gone.isdisjoint(seq.block_ids)
        for block_id in [block_id for block_id in self._reusable if block_id in gone]:
            del self._reusable[block_id]
            self._blank.append(block_id)

    def _require_free(self, needed: int, reserved: int = 0) -> None:
        free = self.num_free_blocks - reserved
        if needed > free:
            raise OutOfBlocksError(
                f"{needed} new blocks are needed; {free} of {self.num_blocks} are free: free a sequence first"
            )

    def _take(self) -> int:
        if self._blank:
            block_id = self._blank.popleft()
        else:
            block_id, _ = self._reusable.popitem(last=False)
            del self._published[self._key_of(block_id)]
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
    """One sequence of a pool: its tokens, its row of the block table, and how much of it is in the cache.

    `num_cached_tokens` were found in the cache when it was allocated, `num_computed_tokens` are in it by now; a
    `withdrawn` one publishes no blocks. Read it freely; only its pool changes it.
    """

    token_ids: list[int]
    block_ids: list[int]
    num_cached_tokens: int
    num_computed_tokens: int
    extra_key: Hashable
    pool: BlockPool = field(repr=False)
    keys: list[_Key] = field(repr=False)  # chain links of its computed full blocks
    content_key: Hashable = field(repr=False)  # its extra_key, with types
    withdrawn: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and those appended since."""
        return len(self.token_ids)


@dataclass
class PoolStats:
    """Counts since the pool was made; a failed call counts nothing."""

    prompts: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the cache, 0 to 1."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True)
class BlockView:
    """One block as the pool sees it: how many sequences use it, and the tokens it is published with."""

    block_id: int
    ref_count: int
    token_ids: tuple[int, ...] | None

    @property
    def state(self) -> Literal["used", "cached", "blank"]:
        """Used by a sequence, or free: cached when its content can still be found, blank when not."""
        if self.ref_count:
            return "used"
        return "blank" if self.token_ids is None else "cached"


def cu_seqlens(lengths: Iterable[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Prefix sums of sequence lengths: row b of a packed batch begins at entry b and ends at entry b + 1.

    Args:
        lengths: tokens of each sequence, integers >= 0: a list, or an integer tensor [batch], which is read.
        device: where the result is; the CPU if nothing is given.

    Returns:
        [batch + 1] int32, beginning with 0.

    Raises:
        ValueError, TypeError: a length is negative or no integer, the sum passes 2**31 - 1, or no device of this
            machine.
    """
    where = resolve_device(device)
    given = _listed(lengths, "lengths")
    sums = list(accumulate((check_int(n, f"lengths[{b}]") for b, n in enumerate(given)), initial=0))
    check_int(sums[-1], "the sum of lengths")
    return torch.tensor(sums, dtype=torch.int32, device=where)


class _Key:
    """Content of a full block: its tokens, its extra key, and through its parent every token before it.

    The hash covers the parent's hash and is computed once. Equality never trusts it: it compares tokens back
    to the first block, or to the first link that both chains share, which is nearly always the parent.
    """

    __slots__ = ("extra_key", "hash", "parent", "token_ids")

    def __init__(self, parent: _Key | None, token_ids: tuple[int, ...], extra_key: Hashable) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.extra_key = extra_key
        self.hash: int = chain_hash(None if parent is None else parent.hash, token_ids, extra_key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Key):
            return NotImplemented
        mine: _Key | None = self
        theirs: _Key | None = other
        while mine is not theirs:
            if mine is None or theirs is None or mine.hash != theirs.hash:
                return False
            if mine.token_ids != theirs.token_ids or mine.extra_key != theirs.extra_key:
                return False
            mine, theirs = mine.parent, theirs.parent
        return True


def chain_hash(parent_hash: int | None, token_ids: tuple[int, ...], extra_key: Hashable) -> int:
    """Hash of a full block and of everything before it."""
    return hash((parent_hash, token_ids, extra_key))


def _typed(key: Hashable) -> Hashable:
    """A key that is equal to another one only if their types are too, for Python says 1 == True == 1.0."""
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
    """The prompt as a list of Python integers, so that equal tokens compare and hash alike."""
    tokens = _listed(token_ids, "token_ids")
    for i, token_id in enumerate(tokens):
        if type(token_id) is not int or not 0 <= token_id < 2**63:
            tokens[i] = _checked_token(token_id, f"token_ids[{i}]")
    if not tokens:
        raise ValueError("token_ids is empty; accepted: at least one token")
    return tokens


def _listed(given: object, name: str) -> list[Any]:
    """Numbers of an argument that may be a list, an iterator or a tensor."""
    if isinstance(given, torch.Tensor):
        given = check_tensor(given, name).tolist()
    if not isinstance(given, Iterable):
        raise TypeError(f"{name} is {shown(given)}; accepted: a list of integers, or an integer tensor [n]")
    return list(given)


def _checked_token(token_id: int, name: str) -> int:
    return check_int(token_id, name, maximum=2**63 - 1)
