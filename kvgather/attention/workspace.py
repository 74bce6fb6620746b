"""Any context in bounded memory: the pieces of a batch of which none gathers more tokens than a workspace holds.

Cut along sequences first, then along keys. Keys of the cached part need no mask. Where a cut goes through the new
tokens, those before it see nothing of what comes after, and those after it see all of what comes before. So two masks
do: none, and the causal one that is aligned to the bottom right.
"""

from __future__ import annotations

from .checked import CheckedBatch
from .cut_by_bounds import by_bounds
from .cut_by_lengths import by_lengths
from .pieces import Pieces


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
