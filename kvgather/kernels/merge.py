"""The kernel that adds a partial attention state to a running one: one launch, where plain torch takes seven."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from .launch import launching
from .values import widen


@triton.jit
def add_state_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, rows,
    stride_part_row, stride_part_head, stride_part_dim, stride_lse_row, stride_lse_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, R: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # of [rows, HEADS], flat
    row, head = at // HEADS, at % HEADS
    in_use = row < rows
    held_lse = tl.load(lse_ptr + at, mask=in_use, other=float("-inf"))
    part_lse = tl.load(part_lse_ptr + row * stride_lse_row + head * stride_lse_head, mask=in_use, other=float("-inf"))
    part_lse = tl.where(part_lse == float("inf"), float("-inf"), part_lse)  # both say: no keys
    top = tl.maximum(held_lse, part_lse)
    base = tl.where(top == float("-inf"), 0.0, top)  # −inf less −inf would be NaN
    held_weight, part_weight = tl.exp(held_lse - base), tl.exp(part_lse - base)
    total = held_weight + part_weight
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    dim = tl.arange(0, DIMS)
    mask = in_use[:, None] & (dim < DIM)[None, :]
    part_at = (row * stride_part_row + head * stride_part_head)[:, None] + dim[None, :] * stride_part_dim
    part = tl.load(part_ptr + part_at, mask=mask, other=0.0)
    if BY_HAND:
        part = widen(part, None, False)
    out_at = at[:, None] * DIM + dim[None, :]
    held = tl.load(out_ptr + out_at, mask=mask, other=0.0)
    merged = held * (held_weight / total)[:, None] + part.to(tl.float32) * (part_weight / total)[:, None]
    tl.store(out_ptr + out_at, merged, mask=mask)
    tl.store(lse_ptr + at, tl.where(seen, base + tl.log(total), float("-inf")), mask=in_use)


def add_state(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a partial state into `out` `[n, heads, dim]` and `lse` `[n, heads]`, FP32, contiguous.

    Args:
        part: `[n, heads, dim]`, any float dtype and strides, 0 where nothing was seen.
        part_lse: `[n, heads]` FP32, any strides; a row with −inf or +inf weighs 0.
    """
    rows, heads, dim = out.shape
    assert out.is_contiguous() and lse.is_contiguous() and out.dtype == lse.dtype == torch.float32
    if out.numel() == 0:
        return
    dims = triton.next_power_of_2(dim)
    per_program = max(1, 2048 // dims)
    with launching(out, interpreting()):
        add_state_kernel[(triton.cdiv(rows * heads, per_program),)](
            out, lse, part, part_lse, rows, *part.stride(), *part_lse.stride(),
            HEADS=heads, DIM=dim, DIMS=dims, R=per_program, BY_HAND=interpreting(),
        )  # fmt: skip
