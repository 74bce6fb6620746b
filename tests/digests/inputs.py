"""Inputs that are the same bytes on every machine: SHAKE-256 of a label, made on the CPU, then moved.

`torch.randn` is not: its bits depend on the CPU's instruction set, and its stream on torch's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor


def raw(label: str, count: int) -> Tensor:
    """`[count]` uint8, every value equally likely."""
    digest = hashlib.shake_256(label.encode()).digest(max(count, 1))
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)[:count]


def normal(label: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """About normally distributed, of standard deviation 1: sums of four integers, so that no rounding differs."""
    count = torch.Size(shape).numel()
    sums = raw(label, 4 * count).view(torch.int8).view(count, 4).sum(1, dtype=torch.int32)
    return (sums.float() / 147).view(shape).to(dtype)


def positive(label: str, *shape: int) -> Tensor:
    """FP32 from 1/61 to 256/61, as scales are."""
    return ((raw(label, torch.Size(shape).numel()).float() + 1) / 61).view(shape)


def shuffled(label: str, count: int) -> Tensor:
    """A permutation of 0 … count − 1, int64."""
    return raw(label, 8 * count).view(torch.int64).argsort(stable=True)


def covering(
    label: str, factors: dict[str, tuple[Any, ...]], fits: Callable[..., bool], draws: int = 600
) -> list[dict[str, Any]]:
    """Few choices of one value for each factor, in which any two values of two factors meet.

    Args:
        label: of the draws, which depend on nothing else.
        factors: the values of each.
        fits: whether a choice, given by name, is possible.
        draws: how many random choices to pick from.
    """
    drawn = []
    for n in range(draws):
        numbers = raw(f"{label} {n}", len(factors)).tolist()
        drawn.append(
            {name: values[i % len(values)] for (name, values), i in zip(factors.items(), numbers, strict=True)}
        )
    drawn = [choice for choice in drawn if fits(**choice)]
    met = [set(combinations(choice.items(), 2)) for choice in drawn]
    missing, chosen = set[Any]().union(*met), list[dict[str, Any]]()
    while missing:
        best = max(range(len(drawn)), key=lambda i: len(met[i] & missing))
        chosen.append(drawn[best])
        missing -= met[best]
    return chosen
