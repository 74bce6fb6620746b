"""One exchange of partial states between all ranks of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.share import Share
from .form import StateForm
from .ranks import Ranks

WHAT = "the all-gather of attention states"
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""From torch 2.13 on the first name; the second one then warns."""


class Exchange:
    """The buffers of one call: those of all ranks, and then this rank's own.

    Attributes:
        form: of the states, once `own` was called.
        buffers: `[ranks + 1, nbytes]` uint8.
    """

    form: StateForm
    buffers: Tensor

    def __init__(self, share: Share, device: torch.device) -> None:
        self._ranks, self._device = share.ranks, device

    def own(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Allocate the buffers; where this rank's output and log-sum-exp go."""
        self.form = form = StateForm(*shape, dtype)
        if 0 in shape:
            out = torch.empty(shape, dtype=dtype, device=self._device)
            return out, torch.empty(shape[:2], dtype=torch.float32, device=self._device)
        self.buffers = torch.empty((self._ranks + 1, form.nbytes), dtype=torch.uint8, device=self._device)
        return form.view(self.buffers, self._ranks)

    def gather(self, group: dist.ProcessGroup, ranks: Ranks) -> None:
        """Move the own buffer to all ranks, and theirs here."""
        states, state = self.buffers[:-1], self.buffers[-1:]
        with ranks.collective(WHAT):
            if self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                work = all_gather(states, state, group=group, async_op=True)
                work.wait()  # the stream waits, the host does not
                ranks.started(WHAT)
            else:
                all_gather(states, state, group=group)
