"""A small kernel with a planted bug, for chapter 05: its results are right, and it reads outside a tensor.

`python -m kvgather.lab.planted ARGUMENT SIDE` runs the kernel in this process, with one argument fenced on one side.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvgather.lab.child import leave_no_core
from kvgather.lab.fence import fenced

ARGUMENTS = ("lengths_ptr", "cu_seqlens_ptr")


@triton.jit
def lengths_kernel(
    lengths_ptr,  # [batch]
    cu_seqlens_ptr,  # [batch + 1]
    batch,
    LANES: tl.constexpr,
):
    i = tl.arange(0, LANES)
    inside = i <= batch
    end = tl.load(cu_seqlens_ptr + i, mask=inside, other=0)
    start = tl.load(cu_seqlens_ptr + i - 1, mask=inside, other=0)
    tl.store(lengths_ptr + i - 1, end - start, mask=inside & (i > 0))


def run(lengths: Tensor, cu_seqlens: Tensor) -> None:
    """Fill `lengths` `[batch]` from prefix sums `[batch + 1]`, both int32."""
    batch = len(lengths)
    lengths_kernel[(1,)](lengths, cu_seqlens, batch, LANES=triton.next_power_of_2(batch + 1))


def main() -> None:
    leave_no_core()
    argument, side = sys.argv[1:]
    tensors = {
        "lengths_ptr": torch.zeros(3, dtype=torch.int32),
        "cu_seqlens_ptr": torch.tensor([0, 5, 5, 9], dtype=torch.int32),
    }
    tensors[argument] = fenced(tensors[argument], side=side)
    run(tensors["lengths_ptr"], tensors["cu_seqlens_ptr"])
    assert tensors["lengths_ptr"].tolist() == [5, 0, 4]


if __name__ == "__main__":
    main()
