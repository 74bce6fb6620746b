"""Lengths, totals and offsets of a batch: each rule by hand, and the clamp of offsets against a plain loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from kvgather.batch.lengths import (
    check_fit,
    check_lengths,
    check_offsets,
    check_row,
    clamped,
    longest_of,
    total_of,
)
from kvgather.plan import PlanError

OFFSETS = torch.tensor([0, 2, 5])


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12), min_size=1, max_size=7), st.integers(0, 12))
def test_clamped_offsets_begin_at_0_never_fall_and_end_below_the_total(numbers: list[int], total: int) -> None:
    wanted, largest = [], numbers[0]
    for number in numbers:
        largest = max(largest, number)
        wanted.append(min(max(largest, 0), total))
    wanted[0] = 0
    given_numbers = torch.tensor(numbers)
    assert clamped(given_numbers, total).tolist() == wanted
    assert given_numbers.tolist() == numbers, "the caller's are left alone"


def test_lengths_are_a_tuple_of_ints() -> None:
    assert check_lengths(None, "seqlens_q", 3) is None
    assert check_lengths([3, 0], "seqlens_q", 2) == (3, 0)
    assert check_lengths((), "seqlens_q", 0) == ()
    assert check_lengths((2**31 - 1,), "seqlens_q", 1) == (2**31 - 1,)


@pytest.mark.parametrize("known", [None, (2, 3)])
def test_a_total_is_given_or_summed_or_read_last(known: tuple[int, ...] | None) -> None:
    assert total_of(7, "q", known, OFFSETS, 8) == 7
    unreadable = torch.empty(3, device="meta", dtype=torch.int64)  # to read it raises
    assert total_of(None, "q", known, OFFSETS if known is None else unreadable, 8) == 5


def test_the_longest_is_the_lengths_or_the_smaller_bound() -> None:
    assert longest_of(None, "max_q", None, 9) == 9
    assert longest_of(4, "max_q", None, 9) == 4 and longest_of(40, "max_q", None, 9) == 9
    assert longest_of(None, "max_q", (2, 5), 9) == 5 and longest_of(7, "max_q", (2, 5), 9) == 5
    assert longest_of(None, "max_q", (), 9) == 0


def test_offsets_that_are_right_are_lengths() -> None:
    assert check_offsets(OFFSETS, "k", 5, None) == [2, 3] == check_offsets(OFFSETS, "k", 9, (2, 3))
    assert check_offsets(torch.tensor([0]), "k", 0, ()) == []
    check_fit(None, None, 4)
    check_fit((9,), None, 4)
    check_fit((4, 0), (4, 0), 4)


def test_a_row_counts_from_the_first_token_that_is_read_to_the_last() -> None:
    """Pages of 4: tokens 5 to 8 are in columns 1 and 2."""
    row = torch.tensor([-1, 3, 0, 99])
    check_row(row, 0, first=5, tokens=9, page_size=4, num_blocks=4)
    check_row(row[:0], 0, first=0, tokens=0, page_size=4, num_blocks=4)
    for first, tokens, words in (
        (3, 9, "block_table[2, 0] (sequence 2, column 0) is -1; accepted: block ids 0 to 3 in every column"),
        (5, 13, "block_table[2, 3] (sequence 2, column 3) is 99;"),
        (16, 17, "block_table[2, 4] (sequence 2, column 4) is past the table's end;"),
    ):
        with pytest.raises(PlanError, match=re.escape(words)):
            check_row(row, 2, first, tokens, page_size=4, num_blocks=4)


def offsets(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: check_lengths("12", "seqlens_q", 2), TypeError, "seqlens_q is str '12'; accepted: None, or a list"),
    (lambda: check_lengths(OFFSETS, "seqlens_q", 3), TypeError, "seqlens_q is Tensor of shape [3]; accepted: None"),
    (lambda: check_lengths([1], "seqlens_k", 2), ValueError, "seqlens_k has 1 lengths; accepted for 2 sequences: 2"),
    (lambda: check_lengths([1, -1], "seqlens_k", 2), ValueError, "seqlens_k[1] is -1; accepted: 0 to"),
    (lambda: check_lengths([2**31], "seqlens_k", 1), ValueError, "seqlens_k[0] is 2147483648; accepted: 0 to"),
    (lambda: check_lengths([True], "seqlens_k", 1), TypeError, "seqlens_k[0] is bool True; accepted: an int"),
    (lambda: total_of(4, "k", (2, 3), OFFSETS, 8), ValueError, "total_k is 4; accepted for seqlens_k of sum 5"),
    (lambda: total_of(-1, "k", None, OFFSETS, 8), ValueError, "total_k is -1; accepted: 0 to"),
    (lambda: total_of(None, "k", (2**31 - 1, 1), OFFSETS, 8), ValueError, "the sum of seqlens_k is 2147483648"),
    (lambda: total_of(None, "k", None, offsets(0, 2**20 + 1), 8), ValueError, "cu_seqlens_k[-1] is 1048577; accepted"),
    (lambda: longest_of(2, "max_k", (2, 3), 9), ValueError, "max_k is 2; accepted: at least 3, the longest"),
    (lambda: check_fit(None, (3, 9), 8), ValueError, "seqlens_k[1] is 9; accepted: at most 8, the positions of a"),
    (lambda: check_fit((1, 4), (3, 3), 8), ValueError, "seqlens_q[1] is 4, and seqlens_k[1] 3; accepted: seqlens_k"),
    (lambda: check_offsets(offsets(1, 2), "q", 5, None), PlanError, "cu_seqlens_q[0] is 1; accepted: 0"),
    (lambda: check_offsets(offsets(0, 2, 1), "q", 5, None), PlanError, "cu_seqlens_q[2] is 1, after 2 (sequence 1)"),
    (lambda: check_offsets(offsets(0, 6), "q", 5, None), PlanError, "end at or below total_q, 5"),
    (lambda: check_offsets(OFFSETS, "q", 5, (2, 2)), PlanError, "seqlens_q[1] is 2, and cu_seqlens_q says 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_is_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        call()
