"""One exchange of partial states between all ranks of a group."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.share import Share
from .form import StateForm
from .ranks import Ranks
from .states import least_bytes

WHAT = "the all-gather of attention states"
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""From torch 2.13 on the first name; the second one then warns."""


class Wire(NamedTuple):
    """The bytes of an exchange, which depend on the form of the states alone.

    Attributes:
        form: of the states.
        shape: of all buffers, `(ranks, nbytes)`.
        out_at, lse_at: bytes from the first buffer to this rank's output, and to its log-sum-exp.
        received: bytes of the other ranks' states.
        least: what has to be received at least, see `least_bytes`.
    """

    form: StateForm
    shape: tuple[int, int]
    out_at: int
    lse_at: int
    received: int
    least: int


@functools.lru_cache(maxsize=1024)
def wire_of(shape: tuple[int, int, int], dtype: torch.dtype, share: Share) -> Wire:
    """The bytes of an exchange of outputs of this shape and dtype."""
    form, (rank, ranks) = StateForm(*shape, dtype), share
    size = form.nbytes
    return Wire(
        form, (ranks, size), rank * size, rank * size + form.lse_at, (ranks - 1) * size, least_bytes(form, ranks)
    )


class Exchange:
    """The buffers of one call, those of all ranks; the rank's own is one of them, and is sent from there.

    Attributes:
        wire: the form and the bytes, once the buffers are allocated.
        buffers: `[ranks, nbytes]` uint8.
    """

    __slots__ = ("_device", "_share", "buffers", "wire")

    buffers: Tensor
    wire: Wire

    def __init__(self, share: Share, device: torch.device) -> None:
        self._share, self._device = share, device

    @property
    def form(self) -> StateForm:
        """Of the states, once the buffers are allocated."""
        return self.wire.form

    def allocate(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
        """Allocate the buffers; the addresses at which this rank's output and log-sum-exp go."""
        self.wire = wire = wire_of(shape, dtype, self._share)
        self.buffers = torch.empty(wire.shape, dtype=torch.uint8, device=self._device)
        first = self.buffers.data_ptr()
        return first + wire.out_at, first + wire.lse_at

    def own(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Allocate the buffers; where this rank's output and log-sum-exp go, as views."""
        self.allocate(shape, dtype)
        if 0 in shape:  # has no bytes that could be viewed
            out = torch.empty(shape, dtype=dtype, device=self._device)
            return out, torch.empty(shape[:2], dtype=torch.float32, device=self._device)
        return self.form.view(self.buffers, self._share.rank)

    def gather(self, group: dist.ProcessGroup, ranks: Ranks) -> None:
        """Move the own buffer to all ranks, and theirs here.

        A collective that is not asynchronous is run by the current stream (NCCL, from torch 2.8 on) or waited for by it
        (other back ends). The local attention before and the merge after are on that stream too, and so is the
        allocator's record of the buffers: their memory is given to a later kernel of this stream only, which runs after
        the collective. So nothing has to keep them until it ends, eagerly or in a CUDA graph.
        """
        buffers, rank = self.buffers, self._share.rank
        # In place, which NCCL and gloo support: input and output are one memory.
        ranks.enter(WHAT, all_gather, buffers, buffers[rank : rank + 1], group)
        if buffers.is_cuda and not torch.cuda.is_current_stream_capturing():
            ranks.started(WHAT)
