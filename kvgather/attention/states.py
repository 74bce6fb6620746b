"""The attention state of all rows, to which those of pieces are added in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gather.dispatch import choose_backend


class RunningState:
    """What rows of q have seen so far.

    Attributes:
        out: `[n, heads, dim]`; FP32 if states are to be merged.
        lse: `[n, heads]` FP32, natural, −inf where nothing was seen.
    """

    def __init__(
        self, rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
    ) -> None:
        self.out = torch.zeros((rows, heads, dim), dtype=dtype, device=device)
        self.backend = backend
        self.lse = torch.full((rows, heads), -torch.inf, dtype=torch.float32, device=device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge what `rows` saw in other keys, in place: a second copy of the state would exceed the workspace bound.

        Args:
            rows: of this state.
            out: `[rows, heads, dim]`, any float dtype, 0 where `lse` is −inf or +inf.
            lse: `[rows, heads]` FP32; a row with −inf or +inf weighs 0.
        """
        held_out, held_lse = self.out[rows], self.lse[rows]
        if choose_backend(self.backend, out.device) == "triton":
            from .states_kernel import add_state  # needs triton, which this module does not

            add_state(held_out, held_lse, out, lse)
            return
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        merged = torch.logaddexp(held_lse, lse)
        base = torch.where(merged == -torch.inf, 0, merged)  # −inf less −inf would be NaN
        held_out *= torch.exp(held_lse - base)[..., None]
        held_out.addcmul_(out, torch.exp(lse - base)[..., None])
        held_lse.copy_(merged)

    def put(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Set what `rows` saw, where that is all they see."""
        self.out[rows], self.lse[rows] = out, lse
