"""Chapter 10: a gather on one rank of a tensor-parallel engine, which trusts the scale that it is given."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..kernels.launch import launching
from ..lab.fence import fenced

__all__ = ["gather_fenced", "gather_on_rank", "gather_on_rank_kernel"]


@triton.jit
def gather_on_rank_kernel(
    codes_ptr,  # [blocks, page, heads, dim], the heads of one rank
    scale_ptr,  # [blocks, heads]
    slots_ptr,  # [tokens]
    out_ptr,  # [tokens, heads, dim]
    first_head,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, DIM)
    slot = tl.load(slots_ptr + token)
    codes = tl.load(codes_ptr + (slot * HEADS + head) * DIM + dim)
    scale = tl.load(scale_ptr + slot // PAGE * HEADS + first_head + head)
    tl.store(out_ptr + (token * HEADS + head) * DIM + dim, codes * scale)


def gather_on_rank(codes: Tensor, scale: Tensor, slots: Tensor, first_head: int = 0) -> Tensor:
    """Gather rows and multiply them by the scale of their block and head, without any check of the scale.

    Args:
        codes: `[blocks, page, heads, dim]` FP32, contiguous: the pool of one rank; dim a power of two.
        scale: `[blocks, heads]` FP32; assumed to be contiguous, and to have the rank's heads.
        slots: `[tokens]` int64.
        first_head: what the kernel adds to its head, before it indexes the scale.

    Returns:
        `[tokens, heads, dim]` FP32.
    """
    _, page, heads, dim = codes.shape
    out = torch.empty((len(slots), heads, dim))
    with launching(out, interpreting()):
        gather_on_rank_kernel[(len(slots), heads)](
            codes, scale, slots, out, first_head, PAGE=page, HEADS=heads, DIM=dim
        )
    return out


def gather_fenced(codes: Tensor, scale: Tensor, slots: Tensor, first_head: int) -> None:
    """`gather_on_rank` with a fence behind the scale: a read behind it ends the process."""
    gather_on_rank(codes, fenced(scale, keep_strides=True), slots, first_head)
