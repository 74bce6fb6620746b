"""Pieces of a batch of which the host knows bounds alone, the same for any lengths within them.

Each piece has as many keys of every sequence, counted from the end, because the new tokens are there. All rows of q are
in every piece; a sequence is cut by giving some of its rows no keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import GatherPlan
from .checked import CheckedBatch
from .pieces import Attend, Piece, Pieces


def by_bounds(batch: CheckedBatch, window: int | None, workspace: int) -> Pieces:
    """Cut what a layer gathers into pieces of at most `workspace` tokens."""
    pieces = _whole(batch, workspace) if window is None else _in_window(batch, window, workspace)
    return Pieces.of(tuple(pieces), merged=True)


def _whole(batch: CheckedBatch, workspace: int) -> Iterator[Piece]:
    step = _tokens_each(batch, workspace, 1)
    lens_q, lens_k = batch.lens_q.long(), torch.where(batch.lens_q > 0, batch.lens_k, 0).long()
    for after in range(0, batch.max_k, step):  # keys behind the piece, of a sequence that is long enough
        end = (lens_k - after).clamp(min=0)
        length = end.clamp(max=step)
        plan = _plan(batch, length, end - length, step)
        if after == 0 or after >= batch.max_q:
            attends = [_attend(batch, lens_q, length, step, causal=after == 0)]
        else:
            behind = lens_q.clamp(max=after)  # new tokens behind the piece see all of it
            split = torch.stack((lens_q - behind, behind), 1)
            none = torch.zeros_like(length)
            attends = [
                _attend(batch, split, torch.stack((length, none), 1), step, causal=True),
                _attend(batch, split, torch.stack((none, length), 1), step, causal=False),
            ]
        yield Piece(plan, tuple(attends))


def _in_window(batch: CheckedBatch, window: int, workspace: int) -> Iterator[Piece]:
    step = _tokens_each(batch, workspace, window) - (window - 1)  # new tokens of each sequence at a time
    lens_q, lens_k = batch.lens_q.long(), batch.lens_k.long()
    for before in range(0, batch.max_q, step):
        skipped = lens_q.clamp(max=before)
        mine = (lens_q - before).clamp(0, step)
        end = (lens_k - lens_q + skipped + mine).clamp(min=0)
        start = (end - mine - (window - 1)).clamp(min=0)
        length = torch.where(mine > 0, end - start, 0)
        plan = _plan(batch, length, start, step + window - 1)
        none = torch.zeros_like(length)
        split_q = torch.stack((skipped, mine, lens_q - skipped - mine), 1)
        split_k = torch.stack((none, length, none), 1)
        yield Piece(plan, (_attend(batch, split_q, split_k, step + window - 1, causal=step > 1, window=window),))


def _tokens_each(batch: CheckedBatch, workspace: int, least: int) -> int:
    each = workspace // batch.num_sequences
    if each < least:
        raise ValueError(
            f"workspace_tokens is {workspace}; accepted for {batch.num_sequences} sequences of unknown lengths"
            f"{f' and a window of {least}' if least > 1 else ''}: {batch.num_sequences * least} or more"
        )
    return each


def _plan(batch: CheckedBatch, length: Tensor, start: Tensor, most: int) -> GatherPlan:
    total = min(batch.total_k, batch.num_sequences * most)
    return batch.plan_of(F.pad(length.cumsum(0), (1, 0)), total, start)


def _attend(
    batch: CheckedBatch, lens_q: Tensor, lens_k: Tensor, max_k: int, causal: bool, window: int | None = None
) -> Attend:
    """All rows of q; the lengths are `[batch]`, or `[batch, parts]` where sequences are cut."""
    cu_q, cu_k = (F.pad(lens.flatten().cumsum(0), (1, 0)).int() for lens in (lens_q, lens_k))
    several = batch.max_q > 1
    return Attend(
        slice(0, batch.total_q), cu_q, cu_k, batch.max_q, max_k, causal=causal and several,
        window=window if causal and several else None,
    )  # fmt: skip
