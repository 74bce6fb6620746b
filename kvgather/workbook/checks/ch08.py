"""Checks of chapter 08: the causal offset, and the first key of a window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvgather.workbook.checks import Wrong, exercise, expect
from kvgather.workbook.checks.shape import ints, pair

MASKS = ((1, 1, None), (3, 3, None), (2, 5, None), (1, 4, None), (3, 6, 1), (4, 9, 3), (3, 3, 10), (0, 4, None))


@exercise("08.1", correct="bottom right: the last new token sees the last key, and everything before it")
def visible(answer: Callable[..., Any]) -> None:
    for len_q, len_k, window in MASKS:
        position = torch.arange(len_k - len_q, len_k)[:, None]
        key = torch.arange(len_k)
        expected = (key <= position) & (key > position - (window or len_k + 1))
        name = f"{len_q} new of {len_k}, window {window}"
        got = answer(len_q, len_k) if window is None else answer(len_q, len_k, window)
        if not isinstance(got, Tensor):
            raise Wrong(f"{name}: expected a tensor, got {type(got).__name__}")
        if got.dtype != torch.bool:
            raise Wrong(f"{name}: expected a boolean tensor, got {got.dtype}")
        expect(expected, got.cpu(), name)


@exercise("08.2", correct="exactly the keys that are visible to a new token")
def window_gather(answer: Callable[..., Any]) -> None:
    cases: tuple[tuple[list[int], list[int], int], ...] = (
        ([7], [23], 6), ([1, 1], [12, 40], 4), ([3, 2], [3, 20], 10), ([5], [9], 1), ([0, 2], [9, 9], 4),
    )  # fmt: skip
    for lens_q, lens_k, window in cases:
        name = f"new {lens_q} of {lens_k}, window {window}"
        starts, lengths = pair(name, answer(list(lens_q), list(lens_k), window))
        firsts = [max(0, k - q - window + 1) if q else k for q, k in zip(lens_q, lens_k, strict=True)]
        expected = [k - first for k, first in zip(lens_k, firsts, strict=True)]
        expect(expected, ints(lengths), f"lengths, {name}")
        # An empty gather may start anywhere.
        actual = [s if n else f for s, n, f in zip(ints(starts), expected, firsts, strict=True)]
        expect(firsts, actual, f"seq_starts, {name}")
