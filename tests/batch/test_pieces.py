"""Pieces: how large a workspace they need, and when one attention does all there is."""

from __future__ import annotations

import pytest
import torch

from kvgather.batch.pieces import Attend, Piece, Pieces
from kvgather.plan import GatherPlan


def piece(tokens: int, *rows: tuple[int, int]) -> Piece:
    """A piece that gathers `tokens` tokens of one sequence; (first row, last row) of each call of the attention."""
    table, offsets = torch.arange(4)[None], torch.tensor([0, tokens])
    plan = GatherPlan.build(table, offsets, page_size=4, num_blocks=4, total_tokens=tokens)
    offsets = offsets.int()
    return Piece(plan, tuple(Attend(slice(*pair), offsets, offsets, tokens, tokens, causal=True) for pair in rows))


def test_the_workspace_holds_the_largest_piece() -> None:
    assert Pieces.of((piece(3, (0, 3)), piece(9, (0, 3)), piece(5, (0, 3))), merged=True).capacity == 9
    assert Pieces.of((), merged=False).capacity == 0


@pytest.mark.parametrize(
    ("pieces", "merged", "at_once"),
    [
        ((piece(5, (0, 5)),), False, True),
        ((piece(5, (0, 5)),), True, False),  # its state is merged with another's
        ((piece(5, (0, 4)),), False, False),  # rows 4 and on belong to no sequence
        ((piece(5, (1, 5)),), False, False),
        ((piece(5, (0, 2)), piece(5, (2, 5))), False, False),
        ((), False, False),
    ],
)
def test_one_attention_does_all_there_is(pieces: tuple[Piece, ...], merged: bool, at_once: bool) -> None:
    assert Pieces.of(pieces, merged).is_single_call(5) is at_once
