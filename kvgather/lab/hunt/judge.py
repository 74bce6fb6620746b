"""Whether a fixed kernel is right: its result, its addresses, its writers, and what it leaves alone.

A fix is right if, in geometries that its author has not seen, the oracle agrees over whole pools, the strict report is
empty, and no element has two writers. Each of the three alone lets a wrong fix of some bug pass. Kernels run under a
trace that skips accesses outside their tensor, so that a wrong fix damages nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..trace import Trace, trace
from .bug import Bug, geometry_label
from .deadline import OutOfTime, deadline
from .differences import Contents, difference

__all__ = ["SECONDS", "about_addresses", "about_writers", "complaint", "traced"]

SECONDS = 20.0
"""The time limit of one launch; right ones take under 0.5 s."""


def complaint(bug: Bug, geometry: Mapping[str, Any], *functions: Any, seconds: float = SECONDS) -> str | None:
    """What is wrong with kernels, or a launcher, in one geometry of a bug; None if nothing is.

    Args:
        bug, geometry: the bug, and arguments of its `inputs`.
        functions: as in `Bug.run`.
        seconds: the time limit.

    Raises:
        Exception: what the kernel or the launcher raised.
        NoRoom: this machine refuses the inputs' memory.
    """
    inputs = bug.inputs(geometry)
    expected = bug.expected(inputs)
    before = Contents(inputs)
    try:
        t = traced(lambda: bug.run(inputs, *functions), seconds)
    except OutOfTime:
        return f"{geometry_label(geometry)}: no result after {seconds:g} s; does a loop never end?"
    if not t.launches and geometry == bug.shows:  # elsewhere there may be nothing to do
        return f"{geometry_label(geometry)}: no kernel was launched"
    found = about_addresses(t) or _about_results(bug, inputs, expected, before) or _about_the_rest(bug, inputs, t)
    return f"{geometry_label(geometry)}: {found}" if found else None


def traced(run: Callable[[], Any], seconds: float = SECONDS) -> Trace:
    """Run a function under a strict trace, with NaN in all memory that it allocates, and within a time limit.

    Raises:
        OutOfTime: the time is over.
        Exception: what the function raised.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns of an overflow in a wrong kernel, which the report names better
        with deadline(seconds), _poisoned_allocations(), trace(strict=True) as t:
            run()
    return t


def about_addresses(t: Trace) -> str | None:
    """The first line of a trace's report that speaks of an access outside its tensor; None if all are inside."""
    return str(t.groups[0]) if t.groups else None


def about_writers(t: Trace) -> str | None:
    """The first line of a trace's report that speaks of an element stored by two programs; None if there is none."""
    return str(t.races[0]) if t.races else None


def _about_results(bug: Bug, inputs: Mapping[str, Any], expected: Mapping[str, Tensor], before: Contents) -> str | None:
    for name, tensor in expected.items():
        found = difference(tensor, inputs[name], name, bug.tolerance)
        if found:
            return found
    changed = [name for name in before.changed() if name not in expected]
    return f"{changed[0]} has changed, which is an input" if changed else None


def _about_the_rest(bug: Bug, inputs: Mapping[str, Any], t: Trace) -> str | None:
    writers = about_writers(t)
    if writers:
        return writers
    passed = {argument.untyped_storage().data_ptr() for launch in t.launches for argument in launch.arguments.values()}
    for name in bug.uncopied if t.launches else ():
        if inputs[name].untyped_storage().data_ptr() not in passed:
            return f"the result is right, but the kernel got a copy of {name}; a pool has gigabytes, at each call"
    return None


@contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Context manager in which `torch.empty` and its relatives are filled with NaN, or the largest integer."""
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill
