"""The merge of the partial states of all ranks in one launch; the twin of `states.merged` in torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..kernels.launch import PreparedLaunch, prepared_once
from ..kernels.merge import divisor_of, log_sum_exp, shift_of
from ..kernels.values import round_to, widen
from .form import StateForm


@triton.jit(do_not_specialize=["rows"])
def merge_ranks_kernel(
    state_ptr, state_lse_ptr, sink_ptr, out_ptr, lse_ptr, rows, stride_out, stride_lse,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, RANKS: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Merge R rows (token, head) of every rank, by the formula of `kernels.merge`, and their head's sink.

    A rank without keys has lse −inf and weighs 0: its output is not read. Strides are those between ranks.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    in_use = row < rows
    dim = tl.arange(0, DIMS)
    top = tl.full([R], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sink_ptr + row % HEADS, mask=in_use, other=float("-inf")).to(tl.float32)
        top = sink
    for rank in tl.static_range(RANKS):
        rank_lse = tl.load(state_lse_ptr + rank * stride_lse + row, mask=in_use, other=float("-inf"))
        top = tl.maximum(top, rank_lse, propagate_nan=tl.PropagateNan.ALL)
    shift = shift_of(top)
    total = tl.zeros([R], tl.float32)
    if SINKS:
        total = tl.exp(sink - shift)
    acc = tl.zeros([R, DIMS], tl.float32)
    for rank in tl.static_range(RANKS):
        rank_lse = tl.load(state_lse_ptr + rank * stride_lse + row, mask=in_use, other=float("-inf"))
        seen = in_use & (rank_lse != float("-inf"))
        mask = seen[:, None] & (dim < DIM)[None, :]
        state = tl.load(state_ptr + rank * stride_out + row[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
        if BY_HAND:
            state = widen(state, None, False)
        weight = tl.exp(rank_lse - shift)
        total += weight
        acc += weight[:, None] * state.to(tl.float32)
    out = acc / divisor_of(total)[:, None]
    mask = in_use[:, None] & (dim < DIM)[None, :]
    tl.store(out_ptr + row[:, None] * DIM + dim[None, :], round_to(out, out_ptr.dtype.element_ty, BY_HAND), mask=mask)
    tl.store(lse_ptr + row, log_sum_exp(shift, total), mask=in_use)


def merge_ranks(buffers: Tensor, form: StateForm, ranks: int, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge the states of the first `ranks` buffers; see `states.merged`."""
    rows, heads, dim, dtype = form
    out = buffers.new_empty((rows, heads, dim), dtype=dtype)
    lse = buffers.new_empty((rows, heads), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if sinks is not None and not sinks.is_contiguous():
        sinks = sinks.contiguous()
    state, result, size = buffers.data_ptr(), (out.data_ptr(), lse.data_ptr()), form.nbytes
    addresses = (state, state + form.lse_at, state if sinks is None else sinks.data_ptr(), *result)
    numbers = (rows * heads, size // dtype.itemsize, size // 4)
    interpreted, sink_dtype = interpreting(), None if sinks is None else sinks.dtype
    key = (
        heads, dim, dtype, ranks, sink_dtype, buffers.device, interpreted, tuple([at & 15 for at in addresses]),
        numbers[1] & 15, numbers[2] & 15,
    )  # fmt: skip
    launch = prepared_once("ranks", key, lambda: _prepared(heads, dim, ranks, sinks is not None, interpreted))
    programs = triton.cdiv(rows * heads, _rows_of_program(dim))
    if not launch.again(programs, addresses, numbers):
        outs, lses = form.views(buffers, ranks)
        launch(programs, (outs, lses, lses if sinks is None else sinks, out, lse), addresses, numbers)
    return out, lse


def _rows_of_program(dim: int) -> int:
    return max(1, 1024 // triton.next_power_of_2(dim))


def _prepared(heads: int, dim: int, ranks: int, sinks: bool, interpreted: bool) -> PreparedLaunch:
    constants = {
        "HEADS": heads, "DIM": dim, "DIMS": triton.next_power_of_2(dim), "RANKS": ranks, "R": _rows_of_program(dim),
        "SINKS": sinks, "BY_HAND": interpreted,
    }  # fmt: skip
    return PreparedLaunch(merge_ranks_kernel, (None,) * 5, (), constants, interpreted)
