"""Checks for the exercises: one verdict per answer, `not yet`, `wrong` or `correct`.

A chapter's checks are in `chNN.py` next to this file, imported with the first check of an exercise:

    @exercise("03.1", correct="that is the byte the kernel loads first")
    def key_byte(answer):
        expect(384, answer(1, 0, 0, 0), "the byte of block 1, head 0, page_offset 0, dim 0")

A check receives the reader's answers. A plain function is wrapped: an unchanged skeleton and an exception in the
reader's code become verdicts, never a traceback.
"""

from __future__ import annotations

import functools
import importlib
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvgather.workbook.checks.compare import first_difference
from kvgather.workbook.kernel_errors import kernel_error
from kvgather.workbook.progress import note_solved

__all__ = ["Correct", "NotYet", "Wrong", "check", "exercise", "exercises", "expect", "first_difference"]


class NotYet(Exception):
    """The reader has not written an answer yet."""


class Wrong(Exception):
    """The reader's answer is wrong; the message names the difference."""


class Correct(Exception):
    """The reader's answer is right, and the message says more than the exercise's own."""


@dataclass(frozen=True)
class _Exercise:
    judge: Callable[..., str | None]
    correct: str
    not_yet: str


_REGISTRY: dict[str, _Exercise] = {}


def exercise(
    name: str, *, correct: str = "well done", not_yet: str = "the skeleton is unchanged; fill it in"
) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Register the decorated function as the check of exercise `name`.

    Args:
        name: chapter and number, such as "03.1".
        correct: message after "correct: " for a right answer.
        not_yet: message after "not yet: " for an unchanged skeleton.
    """

    def register(judge: Callable[..., str | None]) -> Callable[..., str | None]:
        _REGISTRY[name] = _Exercise(judge, correct, not_yet)
        return judge

    return register


def exercises(chapter: str) -> list[str]:
    """The names of the exercises of one chapter ("03"), in order."""
    module = f"{__name__}.ch{chapter}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    found = (name for name in _REGISTRY if name.startswith(f"{chapter}."))
    return sorted(found, key=lambda name: int(name.partition(".")[2]))


def check(name: str, *answers: Any) -> None:
    """Print the verdict on the reader's answer to one exercise; in the reader's copy, remember a solved one.

    Args:
        name: chapter and number, such as "03.1".
        answers: the reader's values or functions.

    Raises:
        ValueError: no exercise has this name.
    """
    known = exercises(name.partition(".")[0])
    if name not in known:
        raise ValueError(
            f"name is {name!r}; accepted in this chapter: {', '.join(known) or 'nothing, it has no checks'}"
        )
    verdict = _verdict(_REGISTRY[name], answers)
    print(verdict)
    if verdict.startswith("correct: ") and (line := note_solved(name, known)):
        print(line)


def expect(expected: Any, got: Any, name: str = "your answer", *, tolerance: float = 0.0) -> None:
    """Raise `Wrong` with the first difference between `expected` and `got`, if there is one.

    Args:
        expected: the right answer (tensor, number, string, list, tuple or dict).
        got: the reader's answer.
        name: name of the answer in the message.
        tolerance: largest accepted difference of two floats, relative to the expected one (absolute below 1).
    """
    if _unfilled(got):
        raise NotYet
    difference = first_difference(expected, got, tolerance=tolerance)
    if difference is not None:
        raise Wrong(f"{name}: {difference}")


def _verdict(entry: _Exercise, answers: tuple[Any, ...]) -> str:
    if any(_unfilled(answer) for answer in answers):
        return f"not yet: {entry.not_yet}"
    try:
        complaint = entry.judge(*(_guarded(answer) for answer in answers))
    except NotYet as verdict:
        return f"not yet: {str(verdict) or entry.not_yet}"
    except Wrong as verdict:
        return f"wrong: {verdict}"
    except Correct as verdict:
        return f"correct: {verdict}"
    except Exception as error:
        return f"wrong: {_one_line(error)}"
    return f"correct: {entry.correct}" if complaint is None else f"wrong: {complaint}"


def _guarded(answer: Any) -> Any:
    """Wrap a plain function so that an unfilled result ends the check; return any other value unchanged."""
    if not isinstance(answer, types.FunctionType):
        return answer

    @functools.wraps(answer)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        if result is None:
            raise NotYet(f"{answer.__name__} returned None; does it end with a return?")
        if _unfilled(result):
            raise NotYet
        return result

    return call


def _unfilled(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(_unfilled(item) for item in value)
    return value is None or value is Ellipsis or value is NotImplemented


def _one_line(error: Exception) -> str:
    """The exception, and the innermost line of the reader's cell in its traceback."""
    inside = kernel_error(error)
    if inside is not None:
        place = f"on line {inside.line} of your cell" if _is_cell(inside.file) else f"on line {inside.line} of its file"
        message = f"your kernel raised {inside.message}, {place}: {inside.source}"
        return f"{message} → {inside.advice}" if inside.advice else message
    text = str(error).strip().split("\n")[0]
    message = f"your code raised {type(error).__name__}" + (f": {text}" if text else "")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_cell(frame.filename)]
    if not own or not own[-1].line:
        return message
    return f"{message}, on line {own[-1].lineno} of your cell: {own[-1].line}"


def _is_cell(file: str) -> bool:
    """Whether a file is a notebook's cell: a path with "ipykernel" in it, or "<ipython-input-…>"."""
    return "ipy" in file.rsplit("/site-", 1)[-1]
