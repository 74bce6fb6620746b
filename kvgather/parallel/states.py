"""Partial states on the wire: one buffer of bytes for a rank's output and log-sum-exp, and the merge of all ranks'.

A rank's buffer has its output `[rows, heads, v_dim]` in q's dtype and, from the next multiple of 16 bytes on, its
log-sum-exp `[rows, heads]` in FP32. One collective then moves both.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.merge import apply_sinks, merge_states
from ..gather.dispatch import choose_backend

ALIGNED = 16
"""Bytes: both parts of a buffer begin at a multiple of this, for wide loads."""


class StateForm(NamedTuple):
    """Shape of a rank's partial state.

    Attributes:
        rows, heads, v_dim: of the output; query heads.
        dtype: of the output.
    """

    rows: int
    heads: int
    v_dim: int
    dtype: torch.dtype

    @property
    def lse_at(self) -> int:
        """The byte at which the log-sum-exp begins."""
        return _aligned(self.rows * self.heads * self.v_dim * self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of a rank's buffer."""
        return self.lse_at + _aligned(self.rows * self.heads * 4)

    def views(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp in the buffers of some ranks.

        Args:
            buffer: `[ranks, nbytes]` uint8, contiguous.

        Returns:
            `[ranks, rows, heads, v_dim]` and `[ranks, rows, heads]`, views.
        """
        elements = self.rows * self.heads
        out = buffer.view(self.dtype)[:, : elements * self.v_dim]
        lse = buffer.view(torch.float32)[:, self.lse_at // 4 : self.lse_at // 4 + elements]
        return out.unflatten(1, (self.rows, self.heads, self.v_dim)), lse.unflatten(1, (self.rows, self.heads))


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNED


def least_bytes(form: StateForm, ranks: int) -> int:
    """Bytes that a rank has to receive at least, so that every rank has the merged rows of all heads.

    Each rank merges 1 / ranks of the rows, for which it receives the states of the others, and then receives the
    finished rows of the others: two collectives. One collective moves all states to all ranks, which is equal for two
    ranks, and faster for few rows.
    """
    elements = form.rows * form.heads
    state, finished = elements * (form.v_dim * form.dtype.itemsize + 4), elements * form.v_dim * form.dtype.itemsize
    return -(-(state + finished) * (ranks - 1) // ranks)


def packed(out: Tensor, lse: Tensor, form: StateForm) -> Tensor:
    """A rank's state as one buffer, `[1, nbytes]` uint8."""
    buffer = torch.empty((1, form.nbytes), dtype=torch.uint8, device=out.device)
    to_out, to_lse = form.views(buffer)
    to_out[0].copy_(out)
    to_lse[0].copy_(lse)
    return buffer


def merged(buffers: Tensor, form: StateForm, sinks: Tensor | None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Merge the states of all ranks; the sink enters once, here.

    Args:
        buffers: `[ranks, nbytes]` uint8, contiguous.
        form: of the states.
        sinks: `[heads]`, or None.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.

    Returns:
        out `[rows, heads, v_dim]` in the form's dtype and the natural log-sum-exp `[rows, heads]` in FP32.
    """
    outs, lses = form.views(buffers)
    if choose_backend(backend, buffers.device) == "triton":
        return _kernels().merge_ranks(outs, lses, sinks)
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
