"""Bounded workspaces: cut a batch into pieces, each of which gathers at most `workspace_tokens` tokens.

Cached keys need no mask. A cut within the new tokens separates their rows: new tokens before the cut see no key after
it, and new tokens after the cut see all keys before it. So each attention call has one of two masks: none, or the
causal mask that is aligned to the bottom right.

A batch is cut in one of two ways. The first needs the lengths on the host; the second only bounds.

By lengths: first, if all sequences have long cached parts, pieces with the same range of keys of every sequence; then
pieces of neighbouring sequences that fit together; a sequence that does not fit on its own is cut along its keys.

By bounds: each piece has an equal number of keys of every sequence, counted from its end, where the new tokens are. All
rows of q are in every piece: rows that must not see its keys form sequences without keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..batch.lengths import STEP, clamped
from ..batch.pieces import Attend, Piece, Pieces
from ..plan import GatherPlan


def in_pieces(batch: CheckedBatch, window: int | None, workspace_tokens: int | None) -> Pieces:
    """Cut the keys of a layer into pieces of at most `workspace_tokens` tokens; None means one piece.

    Raises:
        ValueError: the workspace is smaller than the window, or has less than one token for each sequence of unknown
            length.
        CaptureError: this is the first use of these pieces, and a CUDA graph is being captured.
    """
    if batch.num_sequences == 0:
        return Pieces.of((), merged=False)
    piece = batch.for_window(window)
    if workspace_tokens is None or piece.plan.total_tokens <= workspace_tokens:
        return Pieces.of((piece,), merged=False)
    return batch.once(
        (window, workspace_tokens), lambda: _cut(batch, window, workspace_tokens),
        f"the pieces of a workspace of {workspace_tokens} tokens",
    )  # fmt: skip


def _cut(batch: CheckedBatch, window: int | None, workspace_tokens: int) -> Pieces:
    visible_on_host = batch.visible_lens_on_host(window)
    if visible_on_host is not None:
        return by_lengths(batch, window, workspace_tokens, batch.visible_lens(window), visible_on_host)
    return by_bounds(batch, window, workspace_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# By lengths: the host knows the length of every sequence.
# ---------------------------------------------------------------------------------------------------------------------


def by_lengths(
    batch: CheckedBatch, window: int | None, workspace: int, visible: Tensor, visible_on_host: tuple[int, ...]
) -> Pieces:
    """Cut the keys of a layer into pieces of at most `workspace` tokens.

    Args:
        batch, window: the layer's.
        workspace: tokens.
        visible, visible_on_host: how many tokens at the end of each sequence its new tokens see, `[batch]`.
    """
    assert batch.seqlens_q is not None and batch.seqlens_k is not None
    first_rows = list(accumulate(batch.seqlens_q, initial=0))
    pieces: list[Piece] = []
    covered = 0  # positions at the beginning of each sequence that are in the pieces so far
    if window is None and sum(visible_on_host) > workspace:
        pieces += _equal_ranges(batch, workspace)
        covered = sum(piece.attends[0].max_k for piece in pieces)
        visible = (visible - covered).clamp(min=0)
        visible_on_host = tuple(max(tokens - covered, 0) for tokens in visible_on_host)
    merged = covered > 0
    first, group_tokens = 0, 0  # the next piece: sequences from `first` on, and their keys

    def add_group(end: int) -> None:
        if group_tokens:
            pieces.append(_whole_sequences(batch, window, slice(first, end), first_rows, visible, visible_on_host))

    for sequence, tokens in enumerate(visible_on_host):
        if group_tokens + tokens > workspace:
            add_group(sequence)
            first, group_tokens = sequence, 0
        group_tokens += tokens
        if tokens > workspace:
            lengths = batch.seqlens_q[sequence], batch.seqlens_k[sequence]
            long = _LongSequence(batch, sequence, first_rows[sequence], *lengths)
            pieces += long.cut_keys(covered, workspace) if window is None else long.cut_window(window, workspace)
            merged |= window is None
            first, group_tokens = sequence + 1, 0
    add_group(len(visible_on_host))
    return Pieces.of(tuple(pieces), merged)


def _equal_ranges(batch: CheckedBatch, workspace: int) -> Iterator[Piece]:
    """Cut the part that is cached in all sequences with new tokens into pieces with equal ranges of all of them.

    More sequences in a call keep more of a GPU busy, and the fastest kernels need equal lengths and no mask.
    """
    assert batch.seqlens_q is not None and batch.seqlens_k is not None
    cached = [k - q for q, k in zip(batch.seqlens_q, batch.seqlens_k, strict=True) if q]
    step = workspace // max(len(cached), 1) // STEP * STEP
    if len(cached) > 1 and step:
        for start in range(0, min(cached) - step + 1, step):
            yield common_piece(batch, start, step)


def common_piece(batch: CheckedBatch, start: int, length: int) -> Piece:
    """The cached tokens [start, start + length) of each sequence with new tokens; no mask."""
    assert batch.seqlens_q is not None
    lens_k = torch.where(batch.lens_q > 0, length, 0)
    seqlens_k = tuple(length if new else 0 for new in batch.seqlens_q)
    cu_k = clamped(F.pad(lens_k.cumsum(0), (1, 0)), sum(seqlens_k))
    attend = Attend(
        slice(0, batch.total_q), batch.cu_seqlens_q, cu_k.int(), batch.max_q, length, causal=False,
        seqlens_q=batch.seqlens_q, seqlens_k=seqlens_k,
    )  # fmt: skip
    return Piece(batch.plan_of(cu_k, sum(seqlens_k), torch.full_like(lens_k, start)), (attend,))


def _whole_sequences(
    batch: CheckedBatch, window: int | None, sequences: slice, first_rows: list[int], visible: Tensor,
    visible_on_host: tuple[int, ...],
) -> Piece:  # fmt: skip
    """All visible keys of some neighbouring sequences."""
    assert batch.seqlens_q is not None
    rows = slice(first_rows[sequences.start], first_rows[sequences.stop])
    seqlens_q, seqlens_k = batch.seqlens_q[sequences], visible_on_host[sequences]
    cu_q = batch.cu_seqlens_q[sequences.start : sequences.stop + 1]
    cu_q = (cu_q - cu_q[:1]).clamp(max=rows.stop - rows.start)
    cu_k = clamped(F.pad(visible[sequences].cumsum(0), (1, 0)), sum(seqlens_k))
    plan = batch.plan_of(cu_k, sum(seqlens_k), (batch.lens_k - visible)[sequences], sequences)
    causal = max(seqlens_q) > 1
    attend = Attend(
        rows, cu_q, cu_k.int(), max(seqlens_q), max(seqlens_k), causal=causal, window=window if causal else None,
        seqlens_q=seqlens_q, seqlens_k=seqlens_k,
    )  # fmt: skip
    return Piece(plan, (attend,))


@dataclass(frozen=True)
class _LongSequence:
    """A sequence with more visible keys than the workspace has tokens.

    Attributes:
        batch, sequence: the batch, and the sequence's index.
        first_row: the row of q of its first new token.
        new, total: its new tokens, and its cached + new tokens.
    """

    batch: CheckedBatch
    sequence: int
    first_row: int
    new: int
    total: int

    def cut_keys(self, first: int, workspace: int) -> Iterator[Piece]:
        """Cut the keys from `first` on: the cached ones in steps of the workspace, then the rest with the new ones."""
        cached = self.total - self.new
        rest = first + (cached - first) // workspace * workspace
        for start in range(first, rest, workspace):
            yield self.piece(start, start + workspace, (0, self.new, False))
        if self.total - rest <= workspace:
            yield self.piece(rest, self.total, (0, self.new, True))
            return
        if rest < cached:
            yield self.piece(rest, cached, (0, self.new, False))
        for start in range(0, self.new, workspace):
            end = min(start + workspace, self.new)
            later_rows = [(end, self.new, False)] if end < self.new else []
            yield self.piece(cached + start, cached + end, (start, end, True), *later_rows)

    def cut_window(self, window: int, workspace: int) -> Iterator[Piece]:
        """Cut the new tokens into steps, each with the keys in its windows."""
        step = workspace - (window - 1)
        if step < 1:
            raise ValueError(f"workspace_tokens is {workspace}; accepted for a window of {window}: {window} or more")
        cached = self.total - self.new
        for start in range(0, self.new, step):
            end = min(start + step, self.new)
            yield self.piece(max(0, cached + start - window + 1), cached + end, (start, end, True), window=window)

    def piece(self, start: int, end: int, *attends: tuple[int, int, bool], window: int | None = None) -> Piece:
        """Keys [start, end) of the sequence; each (first, last, causal) of `attends` is a range of its new tokens."""
        pair = torch.arange(2, device=self.batch.device)  # pair * n: the offsets of one sequence of length n
        sequences = slice(self.sequence, self.sequence + 1)
        length = (self.batch.lens_k[sequences] - start).clamp(0, end - start)
        plan = self.batch.plan_of(pair * length, end - start, torch.full_like(length, start), sequences)
        return Piece(
            plan,
            tuple(
                Attend(
                    slice(self.first_row + first, self.first_row + last), (pair * (last - first)).int(),
                    (pair * length).int(), last - first, end - start, causal=causal and last - first > 1,
                    window=window if last - first > 1 else None, seqlens_q=(last - first,), seqlens_k=(end - start,),
                )
                for first, last, causal in attends
            ),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# By bounds: the host knows the totals, max_q and max_k; lengths are tensors on the device.
# ---------------------------------------------------------------------------------------------------------------------


def by_bounds(batch: CheckedBatch, window: int | None, workspace: int) -> Pieces:
    """Cut the keys of a layer into pieces of at most `workspace` tokens."""
    pieces = _cut_keys(batch, workspace) if window is None else _cut_window(batch, window, workspace)
    return Pieces.of(tuple(pieces), merged=True)


def _cut_keys(batch: CheckedBatch, workspace: int) -> Iterator[Piece]:
    step = _tokens_per_sequence(batch, workspace, 1)
    lens_q, lens_k = batch.lens_q.long(), torch.where(batch.lens_q > 0, batch.lens_k, 0).long()
    for later_keys in range(0, batch.max_k, step):  # keys of a sequence after the piece
        end = (lens_k - later_keys).clamp(min=0)
        length = end.clamp(max=step)
        plan = _plan(batch, length, end - length, step)
        if later_keys == 0 or later_keys >= batch.max_q:
            attends = [_attend(batch, lens_q, length, step, causal=later_keys == 0)]
        else:
            later_rows = lens_q.clamp(max=later_keys)  # new tokens after the piece see all of its keys
            split_q = torch.stack((lens_q - later_rows, later_rows), 1)
            zero = torch.zeros_like(length)
            attends = [
                _attend(batch, split_q, torch.stack((length, zero), 1), step, causal=True),
                _attend(batch, split_q, torch.stack((zero, length), 1), step, causal=False),
            ]
        yield Piece(plan, tuple(attends))


def _cut_window(batch: CheckedBatch, window: int, workspace: int) -> Iterator[Piece]:
    step = _tokens_per_sequence(batch, workspace, window) - (window - 1)  # new tokens of each sequence in a piece
    lens_q, lens_k = batch.lens_q.long(), batch.lens_k.long()
    for first in range(0, batch.max_q, step):
        earlier_rows = lens_q.clamp(max=first)
        rows = (lens_q - first).clamp(0, step)
        end = (lens_k - lens_q + earlier_rows + rows).clamp(min=0)
        start = (end - rows - (window - 1)).clamp(min=0)
        length = torch.where(rows > 0, end - start, 0)
        plan = _plan(batch, length, start, step + window - 1)
        zero = torch.zeros_like(length)
        split_q = torch.stack((earlier_rows, rows, lens_q - earlier_rows - rows), 1)
        split_k = torch.stack((zero, length, zero), 1)
        yield Piece(plan, (_attend(batch, split_q, split_k, step + window - 1, causal=step > 1, window=window),))


def _tokens_per_sequence(batch: CheckedBatch, workspace: int, minimum: int) -> int:
    tokens = workspace // batch.num_sequences
    if tokens < minimum:
        raise ValueError(
            f"workspace_tokens is {workspace}; accepted for {batch.num_sequences} sequences of unknown lengths"
            f"{f' and a window of {minimum}' if minimum > 1 else ''}: {batch.num_sequences * minimum} or more"
        )
    return tokens


def _plan(batch: CheckedBatch, length: Tensor, start: Tensor, max_length: int) -> GatherPlan:
    total = min(batch.total_k, batch.num_sequences * max_length)
    return batch.plan_of(F.pad(length.cumsum(0), (1, 0)), total, start)


def _attend(
    batch: CheckedBatch, lens_q: Tensor, lens_k: Tensor, max_k: int, causal: bool, window: int | None = None
) -> Attend:
    """An attention call for all rows of q; lengths are `[batch]`, or `[batch, parts]` for sequences in parts."""
    cu_q, cu_k = (F.pad(lens.flatten().cumsum(0), (1, 0)).int() for lens in (lens_q, lens_k))
    causal = causal and batch.max_q > 1
    return Attend(
        slice(0, batch.total_q), cu_q, cu_k, batch.max_q, max_k, causal=causal, window=window if causal else None
    )
