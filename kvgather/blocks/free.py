"""The free blocks of a pool, in the order of their eviction."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator


class FreeBlocks:
    """A queue of free blocks: blank blocks first, then cached blocks, least recently used first.

    A blank block has no content that a prompt can find. A cached block is published, and a prompt can use it again
    until it is evicted.

    Args:
        num_blocks: blocks in the pool; all are blank at first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blank = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blank) + len(self._cached)

    def __iter__(self) -> Iterator[int]:
        yield from self._blank
        yield from self._cached

    def take(self) -> int:
        """Remove and return the first block of the queue, which must not be empty."""
        return self._blank.popleft() if self._blank else self._cached.popitem(last=False)[0]

    def release(self, block_id: int, *, cached: bool) -> None:
        """Add a block at the end of the blank or of the cached blocks."""
        if cached:
            self._cached[block_id] = None
        else:
            self._blank.append(block_id)

    def reuse(self, block_id: int) -> None:
        """Remove a cached block, which a sequence uses again; no effect on a block that is not free."""
        self._cached.pop(block_id, None)

    def make_blank(self, block_ids: set[int]) -> None:
        """Move the cached blocks among `block_ids` to the end of the blank blocks, in the order of their eviction."""
        for block_id in [block_id for block_id in self._cached if block_id in block_ids]:
            del self._cached[block_id]
            self._blank.append(block_id)
