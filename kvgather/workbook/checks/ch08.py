"""Checks of chapter 08: the causal offset, merging two states, a sink that is counted once, a window's first key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvgather.attention.merge import apply_sinks, merge_states
from kvgather.workbook.checks import NotYet, Wrong, exercise, expect

MASKS = ((1, 1, None), (3, 3, None), (2, 5, None), (1, 4, None), (3, 6, 1), (4, 9, 3), (3, 3, 10), (0, 4, None))
HEADS, DIM = 2, 3


@exercise("08.1", correct="bottom right: the last new token sees the last key, and everything before it")
def visible(answer: Callable[..., Any]) -> None:
    for len_q, len_k, window in MASKS:
        position = torch.arange(len_k - len_q, len_k)[:, None]
        key = torch.arange(len_k)
        expected = (key <= position) & (key > position - (window or len_k + 1))
        name = f"{len_q} new of {len_k}, window {window}"
        got = answer(len_q, len_k) if window is None else answer(len_q, len_k, window)
        _must_be_tensors(name, got)
        if got.dtype != torch.bool:
            raise Wrong(f"{name}: expected a boolean tensor, got {got.dtype}")
        expect(expected, got.cpu(), name)


@exercise("08.2", correct="each half is weighted by its denominator; a half without keys has weight 0")
def merge(answer: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    no_keys = (torch.full((1, HEADS, DIM), math.nan), torch.full((1, HEADS), -math.inf))

    def state(lse: float) -> tuple[Tensor, Tensor]:
        return torch.randn(1, HEADS, DIM, generator=generator), torch.tensor([[lse, lse / 2]])

    cases = {
        "lse 1 and 2": (state(1.0), state(2.0)),
        "lse 200 and 199": (state(200.0), state(199.0)),
        "lse -200 and -199": (state(-200.0), state(-199.0)),
        "lse 3 and -inf": (state(3.0), no_keys),
        "lse -inf and 3": (no_keys, state(3.0)),
        "lse -inf and -inf": (no_keys, no_keys),
    }
    for name, (a, b) in cases.items():
        expected = merge_states(*a, *b)
        got = _pair(name, answer(*(t.clone() for t in (*a, *b))))
        exact = "inf" in name
        for tensor, right, actual in zip(("out", "lse"), expected, got, strict=True):
            expect(right, actual, f"{tensor}, {name}", tolerance=0.0 if exact else 1e-5)


@exercise("08.3", correct="the sink is in the denominator once, for any number of parts")
def finish(answer: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    sinks = torch.tensor([1.5, -2.0])
    no_keys = (torch.full((2, HEADS, DIM), math.nan), torch.full((2, HEADS), -math.inf))

    def state() -> tuple[Tensor, Tensor]:
        return torch.randn(2, HEADS, DIM, generator=generator), torch.randn(2, HEADS, generator=generator)

    cases = {
        "one part": [state()],
        "three parts": [state() for _ in range(3)],
        "two parts, the first without keys": [no_keys, state()],
        "two parts without keys": [no_keys, no_keys],
    }
    for name, parts in cases.items():
        out, lse = parts[0]
        for part in parts[1:]:
            out, lse = merge_states(out, lse, *part)
        # merge_states returns 0 for rows without keys.
        out = torch.where((lse == -math.inf)[..., None], 0, out)
        expected = apply_sinks(out, lse, sinks)
        got = _pair(name, answer([tuple(t.clone() for t in part) for part in parts], sinks.clone()))
        for tensor, right, actual in zip(("out", "lse"), expected, got, strict=True):
            expect(right, actual, f"{tensor}, {name}", tolerance=1e-5)


@exercise("08.4", correct="exactly the keys that are visible to a new token")
def window_gather(answer: Callable[..., Any]) -> None:
    cases: tuple[tuple[list[int], list[int], int], ...] = (
        ([7], [23], 6), ([1, 1], [12, 40], 4), ([3, 2], [3, 20], 10), ([5], [9], 1), ([0, 2], [9, 9], 4),
    )  # fmt: skip
    for lens_q, lens_k, window in cases:
        name = f"new {lens_q} of {lens_k}, window {window}"
        starts, lengths = _pair(name, answer(list(lens_q), list(lens_k), window))
        firsts = [max(0, k - q - window + 1) if q else k for q, k in zip(lens_q, lens_k, strict=True)]
        expected = [k - first for k, first in zip(lens_k, firsts, strict=True)]
        expect(expected, _ints(lengths), f"lengths, {name}")
        # An empty gather may start anywhere.
        actual = [s if n else f for s, n, f in zip(_ints(starts), expected, firsts, strict=True)]
        expect(firsts, actual, f"seq_starts, {name}")


def _pair(name: str, got: Any) -> tuple[Any, Any]:
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong(f"{name}: expected two results, got {type(got).__name__}")
    if any(part is None or part is ... for part in got):
        raise NotYet
    return got[0], got[1]


def _must_be_tensors(name: str, *values: Any) -> None:
    for value in values:
        if value is None or value is ...:
            raise NotYet
        if not isinstance(value, Tensor):
            raise Wrong(f"{name}: expected a tensor, got {type(value).__name__}")


def _ints(values: Any) -> list[int]:
    if isinstance(values, Tensor):
        return [int(value) for value in values.tolist()]
    return list(values) if isinstance(values, Sequence) else values
