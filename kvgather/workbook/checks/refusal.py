"""Answers that return a value for some arguments and must raise a ValueError for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvgather.workbook.checks import Wrong, expect

__all__ = ["must_refuse", "must_return"]

_RAISE = object()


def must_return(expected: Any, answer: Callable[..., Any], *arguments: Any, name: str) -> None:
    """Raise `Wrong` unless the answer returns `expected`; a refusal is reported with the name of the case.

    Args:
        expected: the right result.
        answer: the reader's function.
        arguments: its arguments.
        name: the case in the message.
    """
    try:
        got = answer(*arguments)
    except ValueError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise Wrong(f"{name}: expected {expected!r}, got ValueError: {first_line}") from None
    expect(expected, got, name)


def must_refuse(answer: Callable[..., Any], *arguments: Any, name: str, or_return: Any = _RAISE) -> None:
    """Raise `Wrong` unless the answer raises a ValueError, or returns `or_return` if that is given.

    Args:
        answer: the reader's function.
        arguments: its arguments.
        name: the case in the message.
        or_return: a result that is as right as a refusal.
    """
    try:
        got = answer(*arguments)
    except ValueError:
        return
    if or_return is _RAISE:
        raise Wrong(f"{name}: expected a ValueError, got {got!r}")
    if got is not or_return:
        raise Wrong(f"{name}: expected {or_return!r} or a ValueError, got {got!r}")
