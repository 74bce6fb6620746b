"""A partial state on the wire: one buffer of bytes for a rank's output and log-sum-exp.

A buffer has the output `[rows, heads, v_dim]` in q's dtype and, from the next multiple of 16 bytes on, the log-sum-exp
`[rows, heads]` in FP32. One collective then moves both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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

    def view(self, buffers: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Output `[rows, heads, v_dim]` and log-sum-exp `[rows, heads]` of one rank, views; see `views`."""
        rows, heads, dim, dtype = self
        begin = rank * self.nbytes
        out = buffers.view(dtype).as_strided((rows, heads, dim), (heads * dim, dim, 1), begin // dtype.itemsize)
        return out, buffers.view(torch.float32).as_strided((rows, heads), (heads, 1), (begin + self.lse_at) // 4)

    def views(self, buffers: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of all ranks in their buffers.

        Args:
            buffers: `[n, nbytes]` uint8, contiguous.
            ranks: how many of the buffers, from the first on.

        Returns:
            `[ranks, rows, heads, v_dim]` and `[ranks, rows, heads]`, views.
        """
        rows, heads, dim, dtype = self
        out_size, size = dtype.itemsize, self.nbytes
        out_strides, lse_strides = (size // out_size, heads * dim, dim, 1), (size // 4, heads, 1)
        out = buffers.view(dtype).as_strided((ranks, rows, heads, dim), out_strides, 0)
        return out, buffers.view(torch.float32).as_strided((ranks, rows, heads), lse_strides, self.lse_at // 4)


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNED
