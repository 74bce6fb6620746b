"""Set rows to NaN if their sequence has more new tokens than the batch's `max_q`, on every path.

`max_q` determines how many programs a kernel launches for a sequence: rows past it would be uninitialized, or computed
with a wrong mask. The host may not know the lengths, so the device compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gather.dispatch import choose_backend


def refuse_rows(out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, max_q: int, backend: str = "auto") -> None:
    """Set all rows of sequences with more than `max_q` rows to NaN, in place, without synchronization.

    Args:
        out: `[n, heads, dim]`, a float dtype, any strides.
        lse: `[n, heads]` float32, any strides.
        cu_seqlens_q: `[batch + 1]` int32, on the same device: offsets that never decrease and end at or below n.
        max_q: upper bound of a sequence's rows.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.
    """
    if max_q >= len(out) or len(cu_seqlens_q) < 2 or out.numel() == 0:  # no sequence exceeds max_q
        return
    if choose_backend(backend, out.device) == "triton":
        from .refused_kernel import launch  # imports triton, which may be missing

        launch(out, lse, cu_seqlens_q, max_q)
        return
    ends = cu_seqlens_q[1:].contiguous()
    row = torch.arange(len(out), dtype=ends.dtype, device=out.device)
    sequence = torch.searchsorted(ends, row, right=True)  # `batch` for rows that belong to no sequence
    too_long = torch.cat((cu_seqlens_q.diff() > max_q, ends.new_zeros(1, dtype=torch.bool)))[sequence]
    out.masked_fill_(too_long[:, None, None], torch.nan)
    lse.masked_fill_(too_long[:, None], torch.nan)
