"""What one rank gathers, where the pages of a context are distributed: cached tokens, then its new pages one by one.

A rank's keys are not next to each other in the sequence, so no dense kernel has the right causal mask for all of them.
Cached keys need no mask. A page with new tokens is seen causally by the rows in it, and whole by all later rows. A
window can end within a page, which is then gathered from there on, for one row at a time. `direct_kernel` needs none
of this; these pieces are for devices without Triton, and its slow twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from .checked import CheckedBatch
from .pieces import Attend, Piece, Pieces
from .share import Share


def pieces_of_share(batch: CheckedBatch, window: int | None, workspace_tokens: int | None) -> Pieces:
    """Cut the keys of a layer that are in this rank's pool into pieces of at most `workspace_tokens` tokens.

    Raises:
        ValueError: the host does not know the lengths, or the workspace is smaller than a page or has less than one
            token for each sequence.
        CaptureError: this is the first use of these pieces, and a CUDA graph is being captured.
    """
    if batch.num_sequences == 0:
        return Pieces.of((), merged=False)
    smallest = max(batch.page_size, batch.num_sequences)
    if workspace_tokens is not None and workspace_tokens < smallest:
        raise ValueError(
            f"workspace_tokens is {workspace_tokens}; accepted for {batch.num_sequences} sequences in pages of "
            f"{batch.page_size} tokens, of which this rank has a share: {smallest} or more"
        )
    return batch.once(
        ("share", window, workspace_tokens), lambda: _cut(batch, window, workspace_tokens),
        "the pieces of a rank's share",
    )  # fmt: skip


def _cut(batch: CheckedBatch, window: int | None, workspace_tokens: int | None) -> Pieces:
    assert batch.share is not None
    lens_q, lens_k = _lengths(batch)
    pieces = list(_cached(batch, batch.share, lens_q, lens_k, workspace_tokens)) if window is None else []
    rows = accumulate(lens_q, initial=0)
    for sequence, (first_row, new, tokens) in enumerate(zip(rows, lens_q, lens_k, strict=False)):
        pages = _Pages(batch, batch.share, sequence, first_row, new, tokens, window)
        pieces += pages.pieces()
    return Pieces.of(tuple(pieces), merged=True)


def _lengths(batch: CheckedBatch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if batch.seqlens_q is not None and batch.seqlens_k is not None:
        return batch.seqlens_q, batch.seqlens_k
    if batch.device.type != "cpu":
        raise ValueError(
            'path is "gather", and the batch has a share and no lengths; accepted then: "direct", or a batch that was '
            "built with seqlens_q and seqlens_k"
        )
    return tuple(batch.lens_q.tolist()), tuple(batch.lens_k.tolist())


def _cached(
    batch: CheckedBatch, share: Share, lens_q: tuple[int, ...], lens_k: tuple[int, ...], workspace_tokens: int | None
) -> Iterator[Piece]:
    """The cached tokens of all sequences with new tokens, in equal steps; no mask."""
    held = [share.held(k - q, batch.page_size) if q else 0 for q, k in zip(lens_q, lens_k, strict=True)]
    longest = max(held)
    step = longest if workspace_tokens is None else workspace_tokens // len(held)
    for start in range(0, longest, max(step, 1)):
        lengths = [min(max(tokens - start, 0), step) for tokens in held]
        cu_k = F.pad(torch.tensor(lengths, device=batch.device).cumsum(0), (1, 0)).int()
        attend = Attend(
            slice(0, batch.total_q), batch.cu_seqlens_q, cu_k, batch.max_q, max(lengths), causal=False,
            seqlens_q=batch.seqlens_q, seqlens_k=tuple(lengths),
        )  # fmt: skip
        starts = torch.full((len(held),), start, dtype=torch.int32, device=batch.device)
        yield Piece(batch.plan_of(cu_k, sum(lengths), starts), (attend,))


@dataclass(frozen=True)
class _Pages:
    """The pages of a sequence in this rank's pool that need a mask.

    Attributes:
        batch, share, sequence: the batch, its share, and the sequence's index.
        first_row: the row of q of its first new token.
        new, tokens: its new tokens, and its cached + new tokens.
        window: of the layer, or None.
    """

    batch: CheckedBatch
    share: Share
    sequence: int
    first_row: int
    new: int
    tokens: int
    window: int | None

    def pieces(self) -> Iterator[Piece]:
        page, first_new = self.batch.page_size, self.tokens - self.new
        first_key = first_new if self.window is None else first_new - self.window + 1
        for column in range(max(first_key, 0) // page, -(-self.tokens // page) if self.new else 0):
            if column % self.share.ranks == self.share.rank:
                start, end = column * page, min(column * page + page, self.tokens)
                yield from self._whole(start, end)
                yield from self._parts(start, end)

    def _whole(self, start: int, end: int) -> Iterator[Piece]:
        """Keys of a page: causal for the rows in it, without a mask for later rows whose windows have all of them."""
        first_new = self.tokens - self.new
        if self.window is None:
            start = max(start, first_new)  # the cached ones are in `_cached`
        first, last = max(first_new, start), end  # rows in the page, by their positions
        if first < last:
            seen = start if self.window is None else max(start, first - self.window + 1)
            yield self._piece(seen, end, self._attend(first, last, end - seen, causal=True))
        later = self.tokens if self.window is None else min(self.tokens, start + self.window)
        if (first := max(end, first_new)) < later:
            yield self._piece(start, end, self._attend(first, later, end - start, causal=False))

    def _parts(self, start: int, end: int) -> Iterator[Piece]:
        """Keys of a page from the first one in a row's window on, for each row whose window begins within the page."""
        if self.window is None:
            return
        first = max(self.tokens - self.new, end, start + self.window)
        for position in range(first, min(self.tokens, end + self.window - 1)):
            start = position - self.window + 1
            yield self._piece(start, end, self._attend(position, position + 1, end - start, causal=False))

    def _attend(self, first: int, last: int, keys: int, causal: bool) -> Attend:
        """Rows of the positions [first, last) and all keys of a piece."""
        rows, first_row = last - first, self.first_row + first - (self.tokens - self.new)
        pair = torch.arange(2, dtype=torch.int32, device=self.batch.device)  # pair * n: offsets of one sequence
        causal = causal and rows > 1
        return Attend(
            slice(first_row, first_row + rows), pair * rows, pair * keys, rows, keys, causal=causal,
            window=self.window if causal else None, seqlens_q=(rows,), seqlens_k=(keys,),
        )  # fmt: skip

    def _piece(self, start: int, end: int, attend: Attend) -> Piece:
        """Keys at the positions [start, end), which are in one page."""
        held, device = self.share.held(start, self.batch.page_size), self.batch.device
        cu_k = torch.tensor([0, end - start], dtype=torch.int32, device=device)
        starts = torch.tensor([held], dtype=torch.int32, device=device)
        sequences = slice(self.sequence, self.sequence + 1)
        return Piece(self.batch.plan_of(cu_k, end - start, starts, sequences), (attend,))
