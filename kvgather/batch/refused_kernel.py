"""The kernel that refuses the rows of a sequence with too many new tokens: one program for each sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..kernels.launch import PreparedLaunch, prepared_once


@triton.jit(do_not_specialize=["max_q"])  # else Triton would compile another kernel for 1, a decode step
def refuse_rows_kernel(
    out_ptr, lse_ptr, cu_q_ptr, max_q,
    out_strides, lse_strides,  # row, head and dim; row and head
    HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out[row], lse[row] = NaN for the rows of each sequence that has more than max_q; see `batch.refused`.

    Most programs return at once. Rows and heads are walked as one flat axis, R at a time.
    """
    sequence = tl.program_id(0)
    first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    end = tl.load(cu_q_ptr + sequence + 1).to(tl.int64)
    if end - first <= max_q:
        return
    dim = tl.arange(0, DIMS)
    flat = first * HEADS + tl.arange(0, R)  # of [rows, HEADS]
    while tl.min(flat, 0) < end * HEADS:
        row, head = flat // HEADS, flat % HEADS
        mask = flat < end * HEADS
        offset = (row * out_strides[0] + head * out_strides[1])[:, None] + dim.to(tl.int64)[None, :] * out_strides[2]
        nan = tl.full([R, DIMS], float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, nan, mask=mask[:, None] & (dim < DIM)[None, :])
        nan_lse = tl.full([R], float("nan"), tl.float32)
        tl.store(lse_ptr + row * lse_strides[0] + head * lse_strides[1], nan_lse, mask=mask)
        flat += R


def launch(out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, max_q: int) -> None:
    """Launch the kernel on checked arguments; see `kvgather.batch.refused.refuse_rows`."""
    interpreted = interpreting()
    tensors = (out, lse, cu_seqlens_q)
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    key = out.dtype, out.device, out.shape[1:], out.stride(), lse.stride(), *(at & 15 for at in addresses), interpreted
    launch = prepared_once("refuse rows", key, lambda: _prepared(out, lse, interpreted))
    launch(len(cu_seqlens_q) - 1, tensors, addresses, (max_q,))


def _prepared(out: Tensor, lse: Tensor, interpreted: bool) -> PreparedLaunch:
    _, heads, dim = out.shape
    dims = triton.next_power_of_2(dim)
    constants = {"HEADS": heads, "DIM": dim, "DIMS": dims, "R": max(1, 4096 // dims)}
    return PreparedLaunch(refuse_rows_kernel, (None,) * 3, (out.stride(), lse.stride()), constants, interpreted)
