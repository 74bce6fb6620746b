"""One step of the engine as `PrefixBatch`: block tables and lengths on the host, offsets on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.batch import PrefixBatch
from ..cache import PagedKVCache


class Row(NamedTuple):
    """One request of a step.

    Attributes:
        new, tokens: its tokens in this step, and all its tokens afterwards.
        blocks: its block ids, by the index of the allocator.
    """

    new: int
    tokens: int
    blocks: tuple[Sequence[int], ...]

    @property
    def extends(self) -> bool:
        """Whether this is a prefill after a cached prefix, or after an earlier chunk."""
        return self.new > 1 and self.tokens > self.new


@dataclass(frozen=True)
class Part:
    """Some sequences of a step: their rows of q, and their batch. `rows` is None for all rows."""

    rows: Tensor | None
    batch: PrefixBatch


class GroupStep:
    """A step of the layers that share an allocator. Batches are built at first use, and once for all layers."""

    def __init__(self, rows: Sequence[Row], group: int, pool: PagedKVCache, cu_q: Tensor, cu_k: Tensor) -> None:
        """Keep what the batches are built from.

        Args:
            rows: the requests of the step, in the order of the batch.
            group: the index of the allocator.
            pool: the pool of one of the layers.
            cu_q, cu_k: `[batch + 1]` int32 on the device: the engine's offsets of new tokens, and of all tokens.
        """
        self._rows, self._group, self._geometry = rows, group, pool.geometry
        self._offsets = cu_q, cu_k

    @cached_property
    def batch(self) -> PrefixBatch:
        """All sequences of the step."""
        return self._build(self._rows, *self._offsets)

    @cached_property
    def extended(self) -> Part | None:
        """The prefills that continue cached tokens; None if there are none."""
        return self._part(True)

    @cached_property
    def others(self) -> Part | None:
        """All sequences but `extended`; None if there are none."""
        return self._part(False)

    def _part(self, extends: bool) -> Part | None:
        rows = [row for row in self._rows if row.extends is extends]
        if not rows:
            return None
        if len(rows) == len(self._rows):
            return Part(None, self.batch)
        where: list[int] = []
        begin = 0
        for row in self._rows:
            if row.extends is extends:
                where += range(begin, begin + row.new)
            begin += row.new
        device = self._geometry.device
        return Part(
            torch.tensor(where, device=device),
            self._build(
                rows, _offsets([row.new for row in rows], device), _offsets([row.tokens for row in rows], device)
            ),
        )

    def _build(self, rows: Sequence[Row], cu_q: Tensor, cu_k: Tensor) -> PrefixBatch:
        page, blocks = self._geometry.page_size, self._geometry.num_blocks
        new, tokens = [row.new for row in rows], [row.tokens for row in rows]
        columns = -(-max(tokens) // page)
        table = [[*row.blocks[self._group][:columns], *[-1] * (columns - len(row.blocks[self._group]))] for row in rows]
        return PrefixBatch.build(
            torch.tensor(table, dtype=torch.int32, device=self._geometry.device), cu_q, cu_k, page_size=page,
            num_blocks=blocks, total_q=sum(new), total_k=sum(tokens), seqlens_q=new, seqlens_k=tokens,
        )  # fmt: skip


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    sums = [0]
    for length in lengths:
        sums.append(sums[-1] + length)
    return torch.tensor(sums, dtype=torch.int32, device=device)
