"""What each tool says about each bug: runs of all of them, none remembered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..trace import Trace, trace
from .bug import TOOLS, Bug
from .differences import difference
from .judge import about_addresses, about_writers
from .kernels.rows import NoRoom
from .script import Outcome, fence_outcomes

__all__ = ["ask", "ask_all"]


def ask_all(bugs: Iterable[Bug], *, timeout: float = 60.0) -> Iterator[tuple[str, dict[str, str]]]:
    """The name of each bug, and what each tool says about it; the fences run in child processes.

    Args:
        bugs: the bugs, in order.
        timeout: seconds after which a child process is killed.
    """
    bugs = list(bugs)
    for bug, fence in zip(bugs, fence_outcomes(bugs, timeout=timeout), strict=True):
        yield bug.name, ask(bug, fence)


def ask(bug: Bug, fence: Outcome) -> dict[str, str]:
    """What each tool of `TOOLS` says about one bug: a text, or "" where the tool is silent.

    Args:
        bug: the bug, whose geometry `shows` is run under traces.
        fence: its outcome among `fence_outcomes`.
    """
    try:
        plain, poisoned = _wrong(bug, bug.unpoisoned or bug.shows), _wrong(bug, bug.poisoned or bug.shows)
        reports = [_trace(bug, bug.shows, strict)[0] for strict in (False, True)]
    except NoRoom as error:
        return dict.fromkeys(TOOLS, f"not run: {error}")
    said = (
        plain,
        poisoned,
        *(about_addresses(t) or "" for t in reports),
        about_writers(reports[1]) or "",
        fence.message if fence.kind == "died" else "",
    )
    return dict(zip(TOOLS, said, strict=True))


def _trace(bug: Bug, geometry: Mapping[str, Any], strict: bool) -> tuple[Trace, str]:
    """A trace of the bug, and the first difference from the right contents."""
    inputs = bug.inputs(geometry)
    expected = bug.expected(inputs)
    with trace(strict=strict) as t:
        bug.run(inputs)
    found = (difference(tensor, inputs[name], name, bug.tolerance) for name, tensor in expected.items())
    return t, next((text for text in found if text), "")


def _wrong(bug: Bug, geometry: Mapping[str, Any]) -> str:
    return _trace(bug, geometry, strict=False)[1]
