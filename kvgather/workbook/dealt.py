"""Chapter 10: a batch of sequences whose pages are dealt out to the pools of several ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.batch import PrefixBatch
from ..batch.share import Share
from ..blocks import cu_seqlens
from ..cache import PagedKVCache

__all__ = ["Dealt", "deal"]


def deal(lengths: Sequence[int], page_size: int, ranks: int) -> Tensor:
    """A block table whose column c has block ids of the pool of rank c % ranks: the next free block of that pool.

    Args:
        lengths: tokens of each sequence.
        page_size: tokens per block.
        ranks: how many pools there are.

    Returns:
        `[batch, max_blocks]` int64; -1 past a sequence's pages.
    """
    free = [itertools.count() for _ in range(ranks)]
    pages = [-(-tokens // page_size) for tokens in lengths]
    table = torch.full((len(lengths), max([1, *pages])), -1)
    for sequence, count in enumerate(pages):
        for column in range(count):
            table[sequence, column] = next(free[column % ranks])
    return table


@dataclass(frozen=True)
class Dealt:
    """A batch that every process builds alike, from its numbers alone.

    Attributes:
        cached, new: tokens of each sequence.
        page_size: tokens per block.
        q_heads, kv_heads, dim: of the layer.
        ranks: pools that the pages are dealt out to; 1 for one process with all pages.
        seed: of the rows.
    """

    cached: tuple[int, ...]
    new: tuple[int, ...]
    page_size: int
    q_heads: int
    kv_heads: int
    dim: int
    ranks: int
    seed: int

    @property
    def total(self) -> list[int]:
        """Cached and new tokens of each sequence."""
        return [c + n for c, n in zip(self.cached, self.new, strict=True)]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """q `[new, q_heads, dim]`, and K and V of all tokens `[total, kv_heads, dim]`, FP32, sequence by sequence."""
        random = torch.Generator().manual_seed(self.seed)
        shapes = (
            (sum(self.new), self.q_heads, self.dim),
            *[(sum(self.total), self.kv_heads, self.dim)] * 2,
        )
        q, k, v = (torch.randn(shape, generator=random) for shape in shapes)
        return q, k, v

    def is_new(self) -> Tensor:
        """Which of all tokens are new, `[total]` bool."""
        parts = zip(self.cached, self.new, strict=True)
        return torch.cat([torch.arange(c + n) >= c for c, n in parts])

    def batch(self, share: Share | None = None) -> PrefixBatch:
        """The batch in the pool of one rank; None means the pool of one process."""
        return self._batch(self.new, self.total, share)

    def pool(self, share: Share | None = None) -> PagedKVCache:
        """The pool of one rank with the cached tokens in it, and nothing else; FP8, per-tensor scales."""
        pool = PagedKVCache(
            self.num_blocks, self.page_size, self.kv_heads, self.dim, k_scale=1 / 64, v_scale=1 / 64, device="cpu"
        )
        _, k, v = self.rows()
        cached = ~self.is_new()
        pool.write(k[cached], v[cached], self._batch(self.cached, self.cached, share).slots)
        return pool

    @property
    def block_table(self) -> Tensor:
        """The table that all ranks share, see `deal`."""
        return deal(self.total, self.page_size, self.ranks)

    @property
    def num_blocks(self) -> int:
        """Blocks of each pool."""
        return max(1, int(self.block_table.max()) + 1)

    def _batch(self, new: Sequence[int], total: Sequence[int], share: Share | None) -> PrefixBatch:
        return PrefixBatch.build(
            self.block_table, cu_seqlens(new, "cpu"), cu_seqlens(total, "cpu"), page_size=self.page_size,
            num_blocks=self.num_blocks, seqlens_q=list(new), seqlens_k=list(total), share=share,
        )  # fmt: skip
