"""Pieces: keys that one gather reads, and the attention calls that use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..plan import GatherPlan


class Attend(NamedTuple):
    """Arguments of one call of the dense attention.

    Attributes:
        rows: the rows of q.
        cu_seqlens_q, cu_seqlens_k: `[sequences + 1]` int32: offsets of the sequences in these rows, and in the gathered
            keys.
        max_q, max_k: upper bounds of a sequence's rows and keys.
        causal: True: the mask is causal and aligned to the bottom right, the last row of a sequence sees its last key.
            False: each row sees all keys of its sequence.
        window: how many keys a row sees at most; only with `causal`.
        seqlens_q, seqlens_k: the lengths, or None if the host does not know them.
    """

    rows: slice
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    window: int | None = None
    seqlens_q: tuple[int, ...] | None = None
    seqlens_k: tuple[int, ...] | None = None


class Piece(NamedTuple):
    """One gather, and the attention calls that read its keys."""

    plan: GatherPlan
    attends: tuple[Attend, ...]


@dataclass(frozen=True)
class Pieces:
    """The pieces of a layer.

    Attributes:
        pieces: each row of q whose sequence has keys is in at least one piece.
        capacity: rows of the largest piece, the size of the workspace.
        merged: whether a row can be in several pieces, whose partial states are then merged.
    """

    pieces: tuple[Piece, ...]
    capacity: int
    merged: bool

    def is_single_call(self, rows: int) -> bool:
        """Whether one attention call covers all `rows` of q."""
        if self.merged or len(self.pieces) != 1:
            return False
        return self.pieces[0].attends[0].rows == slice(0, rows)

    @classmethod
    def of(cls, pieces: tuple[Piece, ...], merged: bool) -> Pieces:
        return cls(pieces, max((piece.plan.total_tokens for piece in pieces), default=0), merged)
