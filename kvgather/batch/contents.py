"""What a batch consists of: the numbers that the host knows, and the tensors that its device has."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    """What the host knows of a batch, checked.

    Attributes:
        page_size, num_blocks: of the pool.
        total_q, total_k: capacities.
        max_q: new tokens that a sequence may have.
        most: tokens that a sequence may have, by `max_k` and its row of the table.
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
        table: `[batch, max(columns, 1)]` int32; −1 wherever there is no block of the pool to read.
        cu_q, cu_k: `[batch + 1]` int32, offsets that begin at 0, never fall and end at or below the totals.
        slots: `[total_q]` int64: where each new token is written; −1 for rows that belong to no sequence.
        given: makes views of the copies of the table and of both offsets (int64) as they came.
    """

    table: Tensor
    cu_q: Tensor
    cu_k: Tensor
    slots: Tensor
    given: Callable[[], tuple[Tensor, Tensor, Tensor]]
