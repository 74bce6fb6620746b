"""Checks of chapter 10: a rank's slice of a scale, the place of a position, merging all ranks' states, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvgather.attention.merge import apply_sinks, merge_states
from kvgather.batch.share import Share
from kvgather.parallel.form import StateForm
from kvgather.parallel.heads import heads_of, scale_of_heads
from kvgather.workbook.checks import Wrong, exercise, expect
from kvgather.workbook.checks.shape import ints, pair

HEADS, DIM = 2, 3
NAN = math.nan

State = tuple[Tensor, Tensor]


@exercise("10.1", correct="the columns of the rank's heads, for all blocks")
def scale_of_rank(answer: Callable[..., Any]) -> None:
    for blocks, heads, rank, ranks in ((5, 8, 0, 2), (5, 8, 1, 2), (8, 4, 3, 4), (3, 6, 1, 3), (4, 2, 0, 1)):
        scale = torch.arange(blocks * heads, dtype=torch.float32).view(blocks, heads)
        expected = scale_of_heads(scale, "per-page-head", heads_of(heads, rank, ranks))
        got = answer(scale.clone(), rank, ranks)
        expect(expected, got, f"{blocks} blocks, {heads} heads, rank {rank} of {ranks}")
    scale = torch.ones(4, 8)
    try:
        got = answer(scale, 1, 3)
    except ValueError:
        return
    raise Wrong(f"8 heads, 3 ranks: expected a ValueError, got {list(getattr(got, 'shape', [])) or got!r}")


@exercise("10.2", correct="pages are dealt out in turn, so a rank's own column counts the rounds")
def place(answer: Callable[..., Any]) -> None:
    for page, ranks in ((4, 2), (16, 3), (1, 4), (8, 1)):
        for position in (0, 1, page - 1, page, page * ranks - 1, page * ranks, 5 * page * ranks + page + page // 2):
            column, page_offset = divmod(position, page)
            expected = [column % ranks, column // ranks, page_offset]
            got = answer(position, page, ranks)
            expect(expected, ints(got), f"position {position}, blocks of {page}, {ranks} ranks")
            rank = column % ranks  # by the package's own rule: the pool grows by this position, and by no other
            assert Share(rank, ranks).held(position + 1, page) == Share(rank, ranks).held(position, page) + 1


@exercise(
    "10.3",
    correct="every rank by its own denominator, the sink once, a rank without keys not at all; a lost row stays NaN",
)
def merge_ranks(answer: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    sinks = torch.tensor([0.5, -1.0])

    def state(lse: float, second: float) -> State:
        return torch.randn(HEADS, DIM, generator=generator), torch.tensor([lse, second])

    def lost(lse: float) -> State:
        """A rank whose first head saw a NaN, with a log-sum-exp that shows it, or not."""
        out, lses = state(lse, 0.0)
        out[0] = NAN
        return out, lses

    empty = (torch.full((HEADS, DIM), NAN), torch.full((HEADS,), -math.inf))
    cases = {
        "one rank": [state(1.0, 2.0)],
        "two ranks": [state(1.0, 0.0), state(2.0, -1.0)],
        "three ranks": [state(1.0, 0.0), state(2.0, -1.0), state(0.5, 3.0)],
        "two ranks, lse 200 and 199": [state(200.0, 150.0), state(199.0, 151.0)],
        "three ranks, rank 1 without keys": [state(1.0, 2.0), empty, state(0.0, 1.0)],
        "two ranks, both without keys": [empty, empty],
        "two ranks, rank 0 saw a NaN": [lost(1.0), state(2.0, -1.0)],
        "two ranks, rank 1 saw a NaN, and its lse is NaN": [state(2.0, -1.0), lost(NAN)],
    }
    for name, states in cases.items():
        outs, lses = (torch.stack(parts) for parts in zip(*states, strict=True))
        one_row = [(out[None], lse[None]) for out, lse in states]
        total = one_row[0]
        for following in one_row[1:]:
            total = merge_states(*total, *following)
        expected = [part[0] for part in apply_sinks(*total, sinks)]
        got = pair(name, answer(outs.clone(), lses.clone(), sinks.clone()))
        for tensor, right, actual in zip(("out", "lse"), expected, got, strict=True):
            expect(right, actual, f"{tensor}, {name}", tolerance=1e-5)


@exercise("10.4", correct="the context does not enter: a rank's state has one size at any length")
def received(answer: Callable[..., Any]) -> None:
    cases = (
        (1, 64, 64, 2, 2),
        (1, 64, 64, 2, 4),
        (16, 64, 64, 2, 4),
        (512, 32, 128, 2, 8),
        (3, 8, 16, 4, 3),
        (1, 64, 64, 2, 1),
    )
    for rows, heads, dim, itemsize, ranks in cases:
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        expected = (ranks - 1) * StateForm(rows, heads, dim, dtype).nbytes
        got = answer(rows, heads, dim, itemsize, ranks)
        expect(expected, got, f"{rows} new tokens, {heads} heads of {dim}, {itemsize} bytes each, {ranks} ranks")
