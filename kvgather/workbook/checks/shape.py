"""The shape of a reader's answer: two results, a list of integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvgather.workbook.checks import NotYet, Wrong

__all__ = ["ints", "pair"]


def pair(name: str, got: Any) -> tuple[Any, Any]:
    """The two results of an answer; `name` is the case in the message."""
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong(f"{name}: expected two results, got {type(got).__name__}")
    if any(part is None or part is ... for part in got):
        raise NotYet
    return got[0], got[1]


def ints(values: Any) -> Any:
    """A tensor or a sequence of integers as a list; other values stay as they are."""
    if isinstance(values, Tensor):
        return [int(value) for value in values.tolist()]
    return list(values) if isinstance(values, Sequence) else values
