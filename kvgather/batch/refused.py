"""Rows of a sequence with more new tokens than the batch's `max_q`: NaN, whichever path computed the others.

`max_q` decides how many programs a kernel launches for a sequence, so such rows would be uninitialised memory, or
attended under a mask that is not theirs. Only the device may know how many there are: it is asked there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gather.dispatch import choose_backend


def refuse_rows(out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, max_q: int, backend: str = "auto") -> None:
    """Set the rows of each sequence with more than `max_q` of them to NaN, in place; nothing waits.

    Args:
        out: `[n, heads, dim]`, a float dtype, any strides.
        lse: `[n, heads]` float32, any strides.
        cu_seqlens_q: `[batch + 1]` int32, on the same device: offsets that never fall and end at or below n.
        max_q: rows that a sequence may have.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.
    """
    if max_q >= len(out) or len(cu_seqlens_q) < 2 or out.numel() == 0:  # no sequence has more rows than there are
        return
    if choose_backend(backend, out.device) == "triton":
        from .refused_kernel import launch  # needs triton, which this module does not

        launch(out, lse, cu_seqlens_q, max_q)
        return
    ends = cu_seqlens_q[1:].contiguous()
    row = torch.arange(len(out), dtype=ends.dtype, device=out.device)
    sequence = torch.searchsorted(ends, row, right=True)  # batch for rows that belong to no sequence
    too_many = torch.cat((cu_seqlens_q.diff() > max_q, ends.new_zeros(1, dtype=torch.bool)))[sequence]
    out.masked_fill_(too_many[:, None, None], torch.nan)
    lse.masked_fill_(too_many[:, None], torch.nan)
