"""Merging partial attention states, once for every Triton kernel, and the two kernels that do nothing else.

Parts i of the keys, with output out_i and log-sum-exp lse_i, natural, make

    top = max_i lse_i        w_i = e^(lse_i − top)        out = Σ w_i · out_i / Σ w_i        lse = top + log Σ w_i

A part without keys has lse −inf, and weighs 0; an attention sink is a part with a logit for its lse and no output.
`kernels.softmax` adds keys by the same formula in base 2, `attention.merge` is its twin in torch.

Source: the online softmax of Milakov and Gimelshein (arXiv:1805.02867); parts of one row's keys are Flash-Decoding's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from .launch import launching
from .values import round_to, widen


@triton.jit
def shift_of(top):
    """What exponents are reduced by: `top`, or 0 where nothing was seen, because −inf less −inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def divisor_of(total):
    """What weighted outputs are divided by: Σ w_i, or 1 where that is 0, because nothing was seen."""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def log_sum_exp(shift, total):
    """The natural log-sum-exp of merged rows; −inf where nothing was seen."""
    return tl.where(total == 0, float("-inf"), shift + tl.log(divisor_of(total)))


@triton.jit
def add_state_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, rows,
    stride_part_row, stride_part_head, stride_part_dim, stride_lse_row, stride_lse_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, R: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Merge a part into a running state, in place: `[rows, HEADS, DIM]` and `[rows, HEADS]`, R rows a program.

    One launch, where plain torch takes seven. A part's lse of +inf means no keys, as −inf does.
    """
    state_row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # of [rows, HEADS], flat
    row, head = state_row // HEADS, state_row % HEADS
    in_use = row < rows
    state_lse = tl.load(lse_ptr + state_row, mask=in_use, other=float("-inf"))
    part_lse = tl.load(part_lse_ptr + row * stride_lse_row + head * stride_lse_head, mask=in_use, other=float("-inf"))
    part_lse = tl.where(part_lse == float("inf"), float("-inf"), part_lse)
    top = tl.maximum(state_lse, part_lse)
    shift = shift_of(top)
    state_weight, part_weight = tl.exp(state_lse - shift), tl.exp(part_lse - shift)
    total = state_weight + part_weight
    divisor = divisor_of(total)
    dim = tl.arange(0, DIMS)
    mask = in_use[:, None] & (dim < DIM)[None, :]
    part_offset = (row * stride_part_row + head * stride_part_head)[:, None] + dim[None, :] * stride_part_dim
    part = tl.load(part_ptr + part_offset, mask=mask, other=0.0)
    if BY_HAND:
        part = widen(part, None, False)
    out_offset = state_row[:, None] * DIM + dim[None, :]
    out = tl.load(out_ptr + out_offset, mask=mask, other=0.0)
    # Weights are divided before they multiply: the larger part's is then 1 where the other weighs nothing, and its bits
    # stay.
    merged = out * (state_weight / divisor)[:, None] + part.to(tl.float32) * (part_weight / divisor)[:, None]
    tl.store(out_ptr + out_offset, merged, mask=mask)
    tl.store(lse_ptr + state_row, log_sum_exp(shift, total), mask=in_use)


@triton.jit(do_not_specialize=["total_q", "splits"])
def combine_kernel(
    part_ptr, part_lse_ptr, sink_ptr, out_ptr, lse_ptr, total_q, splits,
    Q_HEADS: tl.constexpr, V_DIM: tl.constexpr, V_PAD: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Merge the parts of each row `[splits, total_q, Q_HEADS, V_DIM]`, and its head's sink; R rows a program.

    All parts of a row are loaded together: one wait for memory, not one for each part.
    """
    rows = total_q.to(tl.int64) * Q_HEADS
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, V_PAD)
    in_use = row < rows
    part_row = split[None, :].to(tl.int64) * rows + row[:, None]  # [R, SPLITS]
    exists = in_use[:, None] & (split < splits)[None, :]
    part_lse = tl.load(part_lse_ptr + part_row, mask=exists, other=float("-inf"))
    mask = exists[:, :, None] & (dim < V_DIM)[None, None, :]
    part = tl.load(part_ptr + part_row[:, :, None] * V_DIM + dim[None, None, :], mask=mask, other=0.0)
    top = tl.max(part_lse, 1)
    if SINKS:
        sink = tl.load(sink_ptr + row % Q_HEADS, mask=in_use, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, sink)
    shift = shift_of(top)
    weight = tl.exp(part_lse - shift[:, None])
    total = tl.sum(weight, 1)
    if SINKS:
        total += tl.exp(sink - shift)
    # Chosen, not multiplied by 0: the output of a part without keys may be anything.
    acc = tl.sum(tl.where((part_lse > float("-inf"))[:, :, None], weight[:, :, None] * part, 0.0), 1)
    lse = log_sum_exp(shift, total)
    out = acc / divisor_of(total)[:, None]
    mask = in_use[:, None] & (dim < V_DIM)[None, :]
    tl.store(out_ptr + row[:, None] * V_DIM + dim[None, :], round_to(out, out_ptr.dtype.element_ty, BY_HAND), mask=mask)
    tl.store(lse_ptr + row, lse, mask=in_use)


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
