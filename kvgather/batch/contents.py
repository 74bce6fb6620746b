"""Data of a batch: sizes that the host knows, and tensors on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    """Checked sizes of a batch, known to the host.

    Attributes:
        page_size, num_blocks: of the pool.
        total_q, total_k: capacities.
        max_q: upper bound of a sequence's new tokens.
        most: upper bound of a sequence's tokens, from `max_k` and the length of a row of the block table.
    """

    page_size: int
    num_blocks: int
    total_q: int
    total_k: int
    max_q: int
    most: int


class BatchTensors(NamedTuple):
    """The tensors of a batch.

    Attributes:
        table: `[batch, max(columns, 1)]` int32; −1 for entries that must not be read.
        cu_q, cu_k: `[batch + 1]` int32: offsets that begin at 0, never decrease, and end at or below the totals.
        slots: `[total_q]` int64: the slot of each new token; −1 for rows that belong to no sequence.
        given: returns copies of the block table and of both offsets (int64) before they were checked.
    """

    table: Tensor
    cu_q: Tensor
    cu_k: Tensor
    slots: Tensor
    given: Callable[[], tuple[Tensor, Tensor, Tensor]]
