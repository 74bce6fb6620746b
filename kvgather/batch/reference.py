"""Compute the tensors of a batch, in which no offset decreases and no block id is outside the pool.

The plain-torch form is the specification; on a GPU `batch_kernel` computes the same in one launch.
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
    """Check a batch's contents on its device, without synchronization. Bad contents do not raise.

    Args:
        table: `[batch, columns]` int32 or int64, any strides.
        cu_q, cu_k: `[batch + 1]` int32 or int64, any stride.
        sizes: the batch's sizes.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.
    """
    if choose_backend(backend, table.device) == "triton":
        return _kernels().launch_batch(table, cu_q, cu_k, sizes)
    batch, columns = table.shape
    inputs = (table.clone(), cu_q.to(torch.int64, copy=True), cu_k.to(torch.int64, copy=True))
    clamped_q = clamped(inputs[1], sizes.total_q)
    lens_k = clamped(inputs[2], sizes.total_k).diff()
    too_long = (lens_k > sizes.most) | (clamped_q.diff() > sizes.max_q)
    lens_k = lens_k.clamp(max=sizes.most)
    ids = inputs[0].long() if columns else inputs[1].new_full((batch, 1), -1)
    has_tokens = torch.arange(ids.shape[1], device=ids.device) * sizes.page_size < lens_k[:, None]
    valid = has_tokens & (ids >= 0) & (ids < sizes.num_blocks) & ~too_long[:, None]
    ids = torch.where(valid, ids, -1).int().contiguous()
    clamped_k = F.pad(lens_k.cumsum(0), (1, 0))
    slots = _slots(ids, clamped_q, lens_k, sizes)
    return BatchTensors(ids, clamped_q.int(), clamped_k.int(), slots, lambda: inputs)


@functools.cache
def _kernels() -> ModuleType:
    from . import kernel  # imports triton, which may be missing

    return kernel


def _slots(table: Tensor, cu_q: Tensor, lens_k: Tensor, sizes: Sizes) -> Tensor:
    """Return the slot of each new token, `[total_q]` int64; −1 for rows without a slot."""
    batch, columns = table.shape
    page_size = sizes.page_size
    if batch == 0:
        return torch.full((sizes.total_q,), -1, device=table.device)
    sequence, position, in_use = new_positions(cu_q, lens_k, sizes.total_q)
    block = table[sequence, (position // page_size).clamp(0, columns - 1)].long()
    return torch.where(in_use & (block >= 0), block * page_size + position % page_size, -1)


def new_positions(cu_q: Tensor, lens_k: Tensor, total_q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each new token is, of a batch with at least one sequence.

    Args:
        cu_q: `[batch + 1]`, offsets that never decrease.
        lens_k: `[batch]`, tokens of each sequence.
        total_q: rows.

    Returns:
        The sequence of each row and the token's position in it, `[total_q]` int64, and whether there is such a token:
        False for rows of no sequence, and for positions below 0, of a sequence with more new tokens than tokens.
    """
    row = torch.arange(total_q, device=cu_q.device)
    sequence = torch.searchsorted(cu_q[1:].long(), row, right=True)
    in_use = sequence < len(lens_k)
    sequence = sequence.clamp(max=len(lens_k) - 1)
    position = (lens_k - cu_q[1:])[sequence] + row
    return sequence, position, in_use & (position >= 0)


def window_offsets(
    cu_q: Tensor, cu_k: Tensor, max_q: int, window: int, capacity: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return which tokens a layer with a window gathers: the last ones of each sequence that a new token sees.

    Args:
        cu_q, cu_k: of a checked batch.
        max_q: the batch's bound. A sequence with more new tokens has NaN rows, and gathers as many tokens as a sequence
            with `max_q` new tokens.
        window: how many keys a query sees at most, itself included.
        capacity: upper bound of the gathered tokens.
        backend: as in `batch_tensors`.

    Returns:
        Offsets of the gathered tokens, `[batch + 1]` int32; and the position at which they begin in each sequence,
        `[batch]` int32.
    """
    if choose_backend(backend, cu_q.device) == "triton":
        return _kernels().launch_window(cu_q, cu_k, max_q, window, capacity)
    lens_k = cu_k.diff()
    visible = window_lengths(cu_q.diff(), lens_k, max_q, window)
    return F.pad(visible.cumsum(0), (1, 0)).clamp(max=capacity).int(), lens_k - visible


def window_lengths(lens_q: Tensor, lens_k: Tensor, max_q: int, window: int) -> Tensor:
    """Return how many tokens at the end of each sequence its new tokens see, `[batch]` int32.

    Sequences without new tokens have no visible keys.
    """
    visible = (lens_q.long().clamp(max=max_q) + (window - 1)).clamp(max=lens_k)
    return torch.where(lens_q > 0, visible, 0).int()
