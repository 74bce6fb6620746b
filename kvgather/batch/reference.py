"""The tensors of a batch, in which no offset falls and no block id is outside the pool: in plain torch, the
specification; on a GPU by `batch_kernel`, in one launch.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gather.dispatch import choose_backend
from .contents import BatchTensors, Sizes
from .lengths import clamped


def batch_tensors(table: Tensor, cu_q: Tensor, cu_k: Tensor, sizes: Sizes, backend: str = "auto") -> BatchTensors:
    """Check a batch's contents on its device; nothing waits for it, and bad contents do not raise.

    Args:
        table: `[batch, columns]` int32 or int64, any strides.
        cu_q, cu_k: `[batch + 1]` int32 or int64, any stride.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.
    """
    if choose_backend(backend, table.device) == "triton":
        return _kernels().launch_batch(table, cu_q, cu_k, sizes)
    batch, columns = table.shape
    given = (table.clone(), cu_q.to(torch.int64, copy=True), cu_k.to(torch.int64, copy=True))
    used_q = clamped(given[1], sizes.total_q)
    lens_k = clamped(given[2], sizes.total_k).diff()
    refused = (lens_k > sizes.most) | (used_q.diff() > sizes.max_q)
    lens_k = lens_k.clamp(max=sizes.most)
    ids = given[0].long() if columns else given[1].new_full((batch, 1), -1)
    reached = torch.arange(ids.shape[1], device=ids.device) * sizes.page_size < lens_k[:, None]
    good = reached & (ids >= 0) & (ids < sizes.num_blocks) & ~refused[:, None]
    ids = torch.where(good, ids, -1).int().contiguous()
    used_k = F.pad(lens_k.cumsum(0), (1, 0))
    return BatchTensors(ids, used_q.int(), used_k.int(), _slots(ids, used_q, lens_k, sizes), lambda: given)


@functools.cache
def _kernels() -> ModuleType:
    from . import kernel  # needs triton, which this module does not

    return kernel


def _slots(table: Tensor, cu_q: Tensor, lens_k: Tensor, sizes: Sizes) -> Tensor:
    """The slot of each new token, `[total_q]` int64."""
    batch, columns = table.shape
    page_size = sizes.page_size
    row = torch.arange(sizes.total_q, device=table.device)
    if batch == 0:
        return torch.full_like(row, -1)
    sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True)
    in_use = sequence < batch
    sequence = sequence.clamp(max=batch - 1)
    position = (lens_k - cu_q[1:])[sequence] + row
    in_use &= position >= 0  # else there are more new tokens than tokens
    block = table[sequence, (position // page_size).clamp(0, columns - 1)].long()
    return torch.where(in_use & (block >= 0), block * page_size + position % page_size, -1)


def window_offsets(
    cu_q: Tensor, cu_k: Tensor, max_q: int, window: int, capacity: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What a window gathers of each sequence: the last tokens that some of its new ones sees.

    Args:
        cu_q, cu_k: of a checked batch.
        max_q: its bound; a sequence with more new tokens is refused, and gathers no more than one that has as many.
        capacity: tokens that are gathered at most.
        backend: as in `batch_tensors`.

    Returns:
        `[batch + 1]` int32 offsets of the gathered tokens, and `[batch]` int32 positions at which they begin.
    """
    if choose_backend(backend, cu_q.device) == "triton":
        return _kernels().launch_window(cu_q, cu_k, max_q, window, capacity)
    lens_k = cu_k.diff()
    seen = window_lengths(cu_q.diff(), lens_k, max_q, window)
    return F.pad(seen.cumsum(0), (1, 0)).clamp(max=capacity).int(), lens_k - seen


def window_lengths(lens_q: Tensor, lens_k: Tensor, max_q: int, window: int) -> Tensor:
    """How many tokens at the end of each sequence its new tokens see, `[batch]` int32. Sequences without new tokens
    have no visible keys."""
    reach = (lens_q.long().clamp(max=max_q) + (window - 1)).clamp(max=lens_k)
    return torch.where(lens_q > 0, reach, 0).int()
