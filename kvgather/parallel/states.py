"""The merge of the partial states of all ranks, and how many bytes had to be moved for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..attention.merge import apply_sinks, merge_states
from ..gather.dispatch import choose_backend
from .form import StateForm


def least_bytes(form: StateForm, ranks: int) -> int:
    """Bytes that a rank has to receive at least, so that every rank has the merged rows of all heads.

    Each rank merges 1 / ranks of the rows, for which it receives the states of the others, and then receives the
    finished rows of the others: two collectives. One collective moves all states to all ranks, which is nearly equal
    for two ranks, and faster for few rows.
    """
    elements = form.rows * form.heads
    state, finished = elements * (form.v_dim * form.dtype.itemsize + 4), elements * form.v_dim * form.dtype.itemsize
    return -(-(state + finished) * (ranks - 1) // ranks)


def merged(
    buffers: Tensor, form: StateForm, ranks: int, sinks: Tensor | None, backend: str = "auto", want_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Merge the states of all ranks; the sink enters once, here.

    Args:
        buffers: `[n, nbytes]` uint8, contiguous, of which the first `ranks` have the states.
        form: of the states.
        ranks: how many, two or more: one rank merges nothing.
        sinks: `[heads]`, or None.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.
        want_lse: whether the caller reads the log-sum-exp; False saves an allocation on a GPU.

    Returns:
        out `[rows, heads, v_dim]` in the form's dtype and the natural log-sum-exp `[rows, heads]` in FP32; None in its
        place if it is not wanted.
    """
    if choose_backend(backend, buffers.device) == "triton":
        merge: Callable[..., tuple[Tensor, Tensor | None]] = _kernels().merge_ranks
        return merge(buffers, form, ranks, sinks, want_lse)
    out, lse = merged_in_torch(buffers, form, ranks, sinks)
    return out, lse if want_lse else None


@torch.no_grad()  # a model's sinks may be parameters
def merged_in_torch(buffers: Tensor, form: StateForm, ranks: int, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The twin of `states_kernel.merge_ranks`."""
    outs, lses = form.views(buffers, ranks)
    out, lse = outs[0].float(), lses[0]
    for other, other_lse in zip(outs[1:], lses[1:], strict=True):
        out, lse = merge_states(out, lse, other, other_lse)
    if sinks is not None:
        out, lse = apply_sinks(out, lse, sinks)
    return out.to(form.dtype), lse


@functools.cache
def _kernels() -> ModuleType:
    from . import states_kernel  # imports triton, which may be missing

    return states_kernel
