"""Checks of chapter 00: two small exercises that introduce the verdicts."""

from __future__ import annotations

from collections.abc import Callable

from kvgather.workbook.checks import Wrong, exercise, expect


@exercise("00.1", correct="three blocks of 16 slots hold 48 tokens", not_yet="put a number in place of the three dots")
def tokens(answer: int) -> None:
    expect(48, answer, "tokens")


@exercise("00.2", correct="all full blocks, and one for the remainder")
def blocks_needed(answer: Callable[[int, int], int]) -> None:
    for num_tokens, page_size in ((32, 16), (33, 16), (1, 16), (16, 16), (0, 16), (47, 16), (10, 4), (7, 1)):
        got = answer(num_tokens, page_size)
        if isinstance(got, float) and got == int(got):
            raise Wrong(f"{got!r} is a float; a number of blocks is an int (use //)")
        expect(-(-num_tokens // page_size), got, f"{num_tokens} tokens, page_size {page_size}")
