"""The write of new rows to their slots of the pool."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def write_kernel(pool_ptr, new_ptr, slots_ptr, num_slots, DIM: tl.constexpr):
    token = tl.program_id(0)
    dim = tl.arange(0, DIM)
    slot = tl.load(slots_ptr + token)
    slot = tl.where(slot < 0, num_slots - 1, slot)
    row = tl.load(new_ptr + token * DIM + dim)
    tl.store(pool_ptr + slot * DIM + dim, row)


def write_rows(pool: Tensor, new: Tensor, slots: Tensor, kernel: Any = write_kernel) -> None:
    """Write `new` [tokens, dim] to the rows `slots` [tokens] int32 of `pool` [num_slots, dim], FP32.

    A captured graph has more tokens than the batch: slot −1 marks the padding. Slot 0 is reserved, and nothing may
    write to it; all other slots may belong to a request.
    """
    kernel[(len(slots),)](pool, new, slots, len(pool), DIM=new.shape[1])


def oracle(pool: Tensor, new: Tensor, slots: Tensor) -> dict[str, Tensor]:
    """The whole pool, one token at a time."""
    rows = pool.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            rows[slot] = new[token]
    return {"pool": rows}


def inputs(slots: list[int], num_slots: int = 16, padding: float = 0.25) -> dict[str, Any]:
    """A pool in which row i holds i, and new rows; those of the padding hold `padding`."""
    new = torch.randn(len(slots), 8, generator=torch.Generator().manual_seed(10))
    new[torch.tensor(slots) < 0] = padding
    return {
        "pool": torch.arange(float(num_slots))[:, None].repeat(1, 8),
        "new": new,
        "slots": torch.tensor(slots, dtype=torch.int32),
    }
