"""The slot of each token of one sequence, from its position and the sequence's block table."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def slots_kernel(slots_ptr, positions_ptr, table_ptr, n, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < n
    position = tl.load(positions_ptr + token)
    block = tl.load(table_ptr + position // PAGE, mask=inside, other=0)
    tl.store(slots_ptr + token, block * PAGE + position % PAGE, mask=inside)


def slots_of(slots: Tensor, positions: Tensor, table: Tensor, page_size: int, kernel: Any = slots_kernel) -> None:
    """Fill `slots` [n] from `positions` [n] and the block `table` [pages], all int32."""
    n = len(positions)
    kernel[(triton.cdiv(n, 8),)](slots, positions, table, n, PAGE=page_size, BLOCK=8)


def oracle(slots: Tensor, positions: Tensor, table: Tensor, page_size: int) -> dict[str, Tensor]:
    """The slots, one position at a time."""
    found = [int(table[p // page_size]) * page_size + p % page_size for p in positions.tolist()]
    return {"slots": torch.tensor(found, dtype=torch.int32)}


def inputs(n: int, page_size: int = 4) -> dict[str, Any]:
    """Positions 0 to n − 1 of a sequence whose blocks are in no order."""
    pages = -(-n // page_size)
    return {
        "slots": torch.full((n,), -1, dtype=torch.int32),
        "positions": torch.arange(n, dtype=torch.int32),
        "table": torch.randperm(pages + 3, generator=torch.Generator().manual_seed(n))[:pages].int(),
        "page_size": page_size,
    }
