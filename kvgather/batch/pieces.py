"""Pieces: keys that are gathered together, and which rows of q attend to them under which mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..plan import GatherPlan


class Attend(NamedTuple):
    """One call of the dense attention.

    Attributes:
        rows: the rows of q it covers.
        cu_seqlens_q, cu_seqlens_k: `[sequences + 1]` int32, into those rows and into the gathered keys.
        max_q, max_k: upper bounds of one sequence's rows and keys.
        causal: the last row of a sequence sees its last key, the row before sees one key less; else all see all.
        window: how many keys a row sees at most; only with `causal`.
        seqlens_q, seqlens_k: the lengths, where the host knows them.
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
    """What is gathered in one go, and everything that attends to it."""

    plan: GatherPlan
    attends: tuple[Attend, ...]


@dataclass(frozen=True)
class Pieces:
    """The pieces of one kind of layer.

    Attributes:
        pieces: each row of q attends in at least one, if its sequence has keys.
        capacity: rows that a workspace for any of them needs.
        merged: whether a row attends in more than one, so that states have to be merged.
    """

    pieces: tuple[Piece, ...]
    capacity: int
    merged: bool

    def all_at_once(self, rows: int) -> bool:
        """Whether one attention does all there is, for all `rows` of q."""
        if self.merged or len(self.pieces) != 1:
            return False
        return self.pieces[0].attends[0].rows == slice(0, rows)

    @classmethod
    def of(cls, pieces: tuple[Piece, ...], merged: bool) -> Pieces:
        return cls(pieces, max((piece.plan.total_tokens for piece in pieces), default=0), merged)
