"""Share: which pages of every sequence are in the pool of one rank, where a context is distributed over several.

Pages are dealt out round robin: column c of the block table belongs to rank c % ranks, and is its column c // ranks. So
every rank holds part of a sequence that is longer than a page, whatever its length, and all parts grow together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.checks import check_int, described


class Share(NamedTuple):
    """The pages of one rank.

    Attributes:
        rank, ranks: pages of the columns `rank`, `rank + ranks`, … of the block table are in this rank's pool.
    """

    rank: int
    ranks: int

    def held(self, tokens: int, page_size: int) -> int:
        """How many of a sequence's first `tokens` tokens are in this rank's pool; 0 for a negative number."""
        rounds, rest = divmod(max(tokens, 0), page_size * self.ranks)
        return rounds * page_size + min(max(rest - self.rank * page_size, 0), page_size)

    def own_columns(self, table: Tensor) -> Tensor:
        """The columns of a block table `[batch, columns]` that belong to this rank, contiguous; at least one column."""
        own = table[:, self.rank :: self.ranks]
        return own.contiguous() if own.shape[1] else table.new_full((table.shape[0], 1), -1)

    def others_masked(self, table: Tensor) -> Tensor:
        """A block table with −1 in the columns of other ranks."""
        own = torch.arange(table.shape[1], device=table.device) % self.ranks == self.rank
        return torch.where(own, table, -1)


def check_share(share: object) -> Share | None:
    """Return the share, or None.

    Raises:
        TypeError, ValueError: `share` is neither None nor a `Share` with a rank from 0 to ranks − 1.
    """
    if share is None:
        return None
    if not isinstance(share, Share):
        raise TypeError(f"share is {described(share)}; accepted: None, or a Share")
    ranks = check_int(share.ranks, "share.ranks", minimum=1)
    rank = check_int(share.rank, "share.rank", maximum=ranks - 1)
    return Share(rank, ranks)
