"""Any context in bounded memory: the pieces of a batch of which none gathers more tokens than a workspace holds.

Cut along sequences first, then along keys. Keys of the cached part need no mask. Where a cut goes through the new
tokens, those before it see nothing of what comes after, and those after it see all of what comes before. So two masks
do: none, and the causal one that is aligned to the bottom right.

Where the host knows the lengths, what is cached in every sequence comes in equal ranges of all, if those are long; then
sequences side by side while they fit; and one that does not fit on its own. Where it knows bounds alone, each piece has
as many keys of every sequence, counted from the end, because the new tokens are there: all rows of q are in every
piece, and a sequence is cut by giving some of its rows no keys.
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
    """Cut what a layer gathers into pieces of at most `workspace_tokens` tokens; None is one piece.

    Raises:
        ValueError: the workspace is too small for the window, or has no token for each sequence of unknown length.
        CaptureError: the batch does not have them yet, and a CUDA graph is being captured.
    """
    if batch.num_sequences == 0:
        return Pieces.of((), merged=False)
    whole = batch.for_window(window)
    if workspace_tokens is None or whole.plan.total_tokens <= workspace_tokens:
        return Pieces.of((whole,), merged=False)
    return batch.once(
        (window, workspace_tokens), lambda: _cut(batch, window, workspace_tokens),
        f"the pieces of a workspace of {workspace_tokens} tokens",
    )  # fmt: skip


def _cut(batch: CheckedBatch, window: int | None, workspace_tokens: int) -> Pieces:
    known = batch.known(window)
    if known is not None:
        return by_lengths(batch, window, workspace_tokens, batch.seen(window), known)
    return by_bounds(batch, window, workspace_tokens)


def by_lengths(batch: CheckedBatch, window: int | None, workspace: int, seen: Tensor, known: tuple[int, ...]) -> Pieces:
    """Cut what a layer gathers into pieces of at most `workspace` tokens.

    Args:
        seen, known: how many tokens at the end of each sequence are gathered, `[batch]` on the device and on the host.
    """
    assert batch.seqlens_q is not None and batch.seqlens_k is not None
    rows = list(accumulate(batch.seqlens_q, initial=0))
    pieces: list[Piece] = []
    done = 0  # positions of each sequence that pieces hold already
    if window is None and sum(known) > workspace:
        pieces += _in_ranges(batch, workspace)
        done = sum(piece.attends[0].max_k for piece in pieces)
        seen, known = (seen - done).clamp(min=0), tuple(max(tokens - done, 0) for tokens in known)
    merged = done > 0
    first, held = 0, 0  # the sequences from `first` on wait to be one piece

    def flush(end: int) -> None:
        if held:
            pieces.append(_side_by_side(batch, window, slice(first, end), rows, seen, known))

    for sequence, needed in enumerate(known):
        if held + needed > workspace:
            flush(sequence)
            first, held = sequence, 0
        held += needed
        if needed > workspace:
            lengths = batch.seqlens_q[sequence], batch.seqlens_k[sequence]
            one = _OneSequence(batch, sequence, rows[sequence], *lengths)
            pieces += one.from_key(done, workspace) if window is None else one.window(window, workspace)
            merged |= window is None
            first, held = sequence + 1, 0
    flush(len(known))
    return Pieces.of(tuple(pieces), merged)


def _in_ranges(batch: CheckedBatch, workspace: int) -> Iterator[Piece]:
    """Equal ranges of all sequences, as far as those with new tokens have them cached: more sequences at a time keep
    more of a GPU busy, and equal lengths without a mask have the fastest kernels."""
    assert batch.seqlens_q is not None and batch.seqlens_k is not None
    cached = [k - q for q, k in zip(batch.seqlens_q, batch.seqlens_k, strict=True) if q]
    step = workspace // max(len(cached), 1) // STEP * STEP
    if len(cached) > 1 and step:
        for start in range(0, min(cached) - step + 1, step):
            yield common_piece(batch, start, step)


def _side_by_side(
    batch: CheckedBatch, window: int | None, which: slice, rows: list[int], seen: Tensor, known: tuple[int, ...]
) -> Piece:
    """Some neighbouring sequences, whole."""
    assert batch.seqlens_q is not None
    mine = slice(rows[which.start], rows[which.stop])
    lens_q, lens_k = batch.seqlens_q[which], known[which]
    cu_q = batch.cu_seqlens_q[which.start : which.stop + 1]
    cu_q = (cu_q - cu_q[:1]).clamp(max=mine.stop - mine.start)
    cu_k = clamped(F.pad(seen[which].cumsum(0), (1, 0)), sum(lens_k))
    plan = batch.plan_of(cu_k, sum(lens_k), (batch.lens_k - seen)[which], which)
    several = max(lens_q) > 1
    attend = Attend(
        mine, cu_q, cu_k.int(), max(lens_q), max(lens_k), causal=several, window=window if several else None,
        seqlens_q=lens_q, seqlens_k=lens_k,
    )  # fmt: skip
    return Piece(plan, (attend,))


@dataclass(frozen=True)
class _OneSequence:
    """A sequence that does not fit into the workspace."""

    batch: CheckedBatch
    sequence: int
    first_row: int
    new: int
    total: int

    def from_key(self, first: int, workspace: int) -> Iterator[Piece]:
        """The cached part from `first` on in steps of the workspace, then what is left of it with the new tokens."""
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
            after = [(end, self.new, False)] if end < self.new else []
            yield self.piece(cached + start, cached + end, (start, end, True), *after)

    def window(self, window: int, workspace: int) -> Iterator[Piece]:
        """The new tokens in steps, each with the keys that its windows reach."""
        step = workspace - (window - 1)
        if step < 1:
            raise ValueError(f"workspace_tokens is {workspace}; accepted for a window of {window}: {window} or more")
        cached = self.total - self.new
        for start in range(0, self.new, step):
            end = min(start + step, self.new)
            yield self.piece(max(0, cached + start - window + 1), cached + end, (start, end, True), window=window)

    def piece(self, start: int, end: int, *attends: tuple[int, int, bool], window: int | None = None) -> Piece:
        """Keys [start, end) of the sequence; each (first, last, causal) of `attends` is some of its new tokens."""
        pair = torch.arange(2, device=self.batch.device)  # times n it is the offsets of one sequence of n
        here = slice(self.sequence, self.sequence + 1)
        length = (self.batch.lens_k[here] - start).clamp(0, end - start)
        plan = self.batch.plan_of(pair * length, end - start, torch.full_like(length, start), here)
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


def common_piece(batch: CheckedBatch, start: int, length: int) -> Piece:
    """`length` tokens of each sequence with new ones, all of them cached: each row sees all of its sequence's."""
    assert batch.seqlens_q is not None
    lens = torch.where(batch.lens_q > 0, length, 0)
    known = tuple(length if new else 0 for new in batch.seqlens_q)
    cu_k = clamped(F.pad(lens.cumsum(0), (1, 0)), sum(known))
    attend = Attend(
        slice(0, batch.total_q), batch.cu_seqlens_q, cu_k.int(), batch.max_q, length, causal=False,
        seqlens_q=batch.seqlens_q, seqlens_k=known,
    )  # fmt: skip
    return Piece(batch.plan_of(cu_k, sum(known), torch.full_like(lens, start)), (attend,))


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
