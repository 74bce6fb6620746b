"""The three questions: which argument, which line, which program goes wrong first."""

from __future__ import annotations

import inspect
import re
from typing import Any

from .bug import Bug, geometry_label

__all__ = ["lines_of", "place_complaint"]


def place_complaint(bug: Bug, argument: Any, line: Any, program: Any) -> str | None:
    """What is wrong with a reader's answers; None if all three are right.

    Args:
        bug: the bug; the questions are about its geometry `shows`.
        argument: the name of a kernel's argument: the one that is read or written wrongly.
        line: a part of a line's text that no other line has, or its number in the kernel's file.
        program: the first program that reads or writes something wrong, a tuple of ints; an int will do for one axis.
    """
    return _about_argument(bug, argument) or _about_line(bug, line) or _about_program(bug, program)


def lines_of(bug: Bug) -> dict[int, str]:
    """The lines of the bug's kernels, by their number in the module's file."""
    found: dict[int, str] = {}
    for kernel in bug.functions:
        source, first = inspect.getsourcelines(kernel.fn)
        found |= {first + i: text.rstrip() for i, text in enumerate(source) if text.strip()}
    return found


def _about_argument(bug: Bug, answer: Any) -> str | None:
    names = [name for kernel in bug.functions for name in inspect.signature(kernel.fn).parameters]
    names = [name for name in names if name.endswith("_ptr")]
    if not isinstance(answer, str) or answer not in names:
        return f"argument is {answer!r:.60}; accepted: one of {', '.join(dict.fromkeys(names))}"
    return None if answer in bug.arguments else f"argument: {_near(bug, answer)}"


def _about_line(bug: Bug, answer: Any) -> str | None:
    lines = lines_of(bug)
    if isinstance(answer, bool) or not isinstance(answer, int | str) or not str(answer).strip():
        return f"line is {answer!r:.60}; accepted: the text of a line of the kernel, or its number in the file"
    if isinstance(answer, int):
        named = {_plain(lines[answer])} if answer in lines else set()
        unknown = f"line is {answer}; the kernels have the lines {min(lines)} to {max(lines)} of {bug.name}.py"
    else:
        named = {text for text in map(_plain, lines.values()) if _plain(answer) in text}
        unknown = f"line: no line of the kernel as it was contains {answer!r:.80}"
    if not named:
        return _about_launch(bug, answer) or unknown
    right = {_plain(text) for text in bug.lines}
    if not named & right:
        return f"line: {_near(bug, next(text for text in lines.values() if _plain(text) in named))}"
    return None if named <= right else f"line: {len(named)} lines contain {answer!r:.60}; give the whole line"


def _about_launch(bug: Bug, answer: int | str) -> str | None:
    """What the registry says to the line of the launcher that launches the kernel; None if the answer is another."""
    source, first = inspect.getsourcelines(getattr(bug.module, bug.launcher))
    for number, text in enumerate(source, start=first):
        launch = text.strip().replace("kernel[", f"{bug.kernels[0]}[")  # as in the chapter
        if launch in bug.near and (answer == number if isinstance(answer, int) else _plain(answer) in _plain(launch)):
            return f"line: {bug.near[launch]}"
    return None


def _about_program(bug: Bug, answer: Any) -> str | None:
    axes = len(bug.programs[0])
    given = (answer,) if isinstance(answer, int) and not isinstance(answer, bool) else answer
    if not isinstance(given, tuple | list) or not all(type(index) is int for index in given) or len(given) != axes:
        example = "(0,)" if axes == 1 else "(0, 1)"
        return f"program is {answer!r:.60}; accepted: an index for each axis of the grid, such as {example}"
    return None if tuple(given) in bug.programs else f"program: {_near(bug, tuple(given))}"


def _near(bug: Bug, answer: Any) -> str:
    """What the registry says to a wrong answer, or a plain no."""
    if isinstance(answer, str):
        for known, text in bug.near.items():
            if isinstance(known, str) and _plain(known) == _plain(answer):
                return text
    elif answer in bug.near:
        return bug.near[answer]
    shown = answer.strip() if isinstance(answer, str) else answer
    return f"{shown} is not where it goes wrong first, with {geometry_label(bug.shows)}"


def _plain(text: str) -> str:
    """A line without its comment and its spaces."""
    return re.sub(r"\s+|#.*", "", text)
