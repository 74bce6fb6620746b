"""The merge of the partial states of all ranks in one launch; the twin of `states.merged` in torch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..kernels.launch import PreparedLaunch, prepared_once
from ..kernels.merge import divisor_of, log_sum_exp, shift_of
from ..kernels.values import round_to, widen
from .form import ALIGNED, StateForm


@triton.jit(do_not_specialize=["rows", "stride"])
def merge_ranks_kernel(
    state_ptr, state_lse_ptr, sink_ptr, out_ptr, lse_ptr, rows, stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, RANKS: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, BY_HAND: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Merge R rows (token, head) of every rank, by the formula of `kernels.merge`, and their head's sink.

    A rank without keys has lse −inf and weighs 0: its output is not read. The stride between ranks is in units of UNIT
    bytes: so 32 bits are enough for it, and Triton sees that loads are aligned. The merged log-sum-exp is stored if
    LSE.
    """
    stride_out = stride.to(tl.int64) * (UNIT * 8 // state_ptr.dtype.element_ty.primitive_bitwidth)
    stride_lse = stride.to(tl.int64) * (UNIT // 4)
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
    if LSE:
        tl.store(lse_ptr + row, log_sum_exp(shift, total), mask=in_use)


def merge_ranks(
    buffers: Tensor, form: StateForm, ranks: int, sinks: Tensor | None, want_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Merge the states of the first `ranks` buffers; see `states.merged`."""
    rows, heads, dim, dtype = form
    out = buffers.new_empty((rows, heads, dim), dtype=dtype)
    lse = buffers.new_empty((rows, heads), dtype=torch.float32) if want_lse else None
    if rows == 0 or heads == 0 or dim == 0:
        return out, lse
    if sinks is not None and not sinks.is_contiguous():
        sinks = sinks.contiguous()
    state = buffers.data_ptr()
    # The states stand in for what is not read or stored.
    sink_at = state if sinks is None else sinks.data_ptr()
    out_at, lse_at = out.data_ptr(), state if lse is None else lse.data_ptr()
    alignment = state & 15, sink_at & 15, out_at & 15, lse_at & 15
    sink_dtype = None if sinks is None else sinks.dtype
    work = _work_of(form, ranks, sink_dtype, want_lse, buffers.device, interpreting(), alignment)
    addresses = (state, state + work.lse_at, sink_at, out_at, lse_at)
    if not work.launch.again(work.programs, addresses, work.numbers):
        outs, lses = form.views(buffers, ranks)
        pointers = (outs, lses, outs if sinks is None else sinks, out, outs if lse is None else lse)
        work.launch(work.programs, pointers, addresses, work.numbers)
    return out, lse


class _Work(NamedTuple):
    """A launch for states of one form.

    Attributes:
        launch: prepared.
        programs: the grid.
        numbers: of the launch: rows, and the stride between ranks.
        lse_at: byte of the first rank's log-sum-exp.
    """

    launch: PreparedLaunch
    programs: int
    numbers: tuple[int, int]
    lse_at: int


@functools.lru_cache(maxsize=1024)
def _work_of(
    form: StateForm, ranks: int, sink_dtype: torch.dtype | None, want_lse: bool, device: torch.device,
    interpreted: bool, alignment: tuple[int, ...],
) -> _Work:  # fmt: skip
    rows, heads, dim, dtype = form
    together = max(1, 1024 // triton.next_power_of_2(dim))
    numbers = (rows * heads, form.nbytes // ALIGNED)
    key = heads, dim, dtype, ranks, sink_dtype, want_lse, device, interpreted, alignment

    def prepare() -> PreparedLaunch:
        constants = {
            "HEADS": heads, "DIM": dim, "DIMS": triton.next_power_of_2(dim), "RANKS": ranks, "R": together,
            "SINKS": sink_dtype is not None, "LSE": want_lse, "BY_HAND": interpreted,
            "UNIT": ALIGNED,
        }  # fmt: skip
        return PreparedLaunch(merge_ranks_kernel, (None,) * 5, (), constants, interpreted)

    launch = prepared_once("ranks", key, prepare)
    return _Work(launch, -(-numbers[0] // together), numbers, form.lse_at)
