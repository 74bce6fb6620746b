"""Code of the package for the notebooks, read from the function that runs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

__all__ = ["source_of"]


def source_of(thing: Any, first: str | None = None, last: str | None = None) -> str:
    """The source of a function, class or Triton kernel without docstrings, or a part of it.

    Args:
        thing: a function, a class, or a Triton kernel, whose function is shown.
        first: text in the first line to show; None begins at the top.
        last: text in the last line to show, at or after `first`; None goes to the end.

    Raises:
        ValueError: no line contains `first` or `last`.
    """
    lines = textwrap.dedent(inspect.getsource(getattr(thing, "fn", thing))).splitlines()
    hidden = {number for begin, end in _docstrings("\n".join(lines)) for number in range(begin, end + 1)}
    shown = [line for number, line in enumerate(lines, start=1) if number not in hidden]
    begin = 0 if first is None else _find(shown, first, 0)
    end = len(shown) - 1 if last is None else _find(shown, last, begin)
    return textwrap.dedent("\n".join(shown[begin : end + 1])).rstrip()


def _docstrings(code: str) -> list[tuple[int, int]]:
    """First and last line of every docstring in `code`, counted from 1."""
    ranges = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            ranges.append((text.lineno, text.end_lineno or text.lineno))
    return ranges


def _find(lines: list[str], text: str, start: int) -> int:
    for number in range(start, len(lines)):
        if text in lines[number]:
            return number
    raise ValueError(f"text is {text!r}; accepted: a part of a line of the source from line {start + 1} on")
