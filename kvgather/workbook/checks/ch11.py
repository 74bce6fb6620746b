"""Checks of chapter 11: the place of each bug of the hunt, the fixed kernel, and a kernel of the reader's own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvgather.lab.hunt import BUGS, Bug
from kvgather.lab.hunt.deadline import OutOfTime
from kvgather.lab.hunt.differences import difference
from kvgather.lab.hunt.handed_in import WrongKind, about_signature, as_functions, unchanged
from kvgather.lab.hunt.judge import SECONDS, about_addresses, about_writers, complaint, traced
from kvgather.lab.hunt.kernels.rows import NoRoom
from kvgather.lab.hunt.place import place_complaint
from kvgather.workbook.checks import Correct, NotYet, Wrong, exercise

OWN = f"11.{len(BUGS) + 1}"


def _found_and_fixed(bug: Bug, place: Any, fixed: Any) -> None:
    """Judge (argument, line, program), then the fix: in the script's geometry, and in those that nobody has seen."""
    if not isinstance(place, tuple | list) or len(place) != 3:
        raise Wrong(f"expected (argument, line, program), got {place!r:.60}")
    for name, answer in zip(("argument", "line", "program"), place, strict=True):
        if answer is None or answer is Ellipsis:
            raise NotYet(f"{name} is still open")
    found = place_complaint(bug, *place)
    if found:
        raise Wrong(found)
    try:
        functions = as_functions(bug, fixed)
    except WrongKind as error:
        raise Wrong(str(error)) from None
    if unchanged(bug, functions):
        raise NotYet(about_signature(bug, functions) or "argument, line and program are right; now fix the kernel")
    for geometry in (bug.shows, *bug.hidden):
        try:
            found = complaint(bug, geometry, *functions)
        except NoRoom as error:
            raise NotYet(str(error)) from None
        if found:
            raise Wrong(found)


for _number, _bug in enumerate(BUGS.values(), start=1):
    exercise(
        f"11.{_number}",
        correct=f"{_bug.family}; {_bug.lesson}",
        not_yet="find argument, line and program; then fix the kernel",
    )(functools.partial(_found_and_fixed, _bug))


@exercise(OWN, not_yet="write the inputs, the launch and the oracle of a kernel of yours")
def own_kernel(make: Callable[[], Any], launch: Callable[..., Any], oracle: Callable[..., Any]) -> None:
    """Trace a reader's kernel, and report: addresses, the oracle's result, elements with two writers."""
    for name, function in (("my_inputs", make), ("my_launch", launch), ("my_oracle", oracle)):
        if not callable(function):
            raise Wrong(f"{name} is {function!r:.60}; expected a function")
    inputs = make()
    if not isinstance(inputs, Mapping) or not any(isinstance(value, Tensor) for value in inputs.values()):
        raise Wrong(f"my_inputs returned a {type(inputs).__name__}; expected a dict with at least one tensor")
    expected = _tensors(_timed("my_oracle", lambda: oracle(**copy.deepcopy(dict(inputs))), launches=False), "my_oracle")
    results: list[Any] = []
    t = _timed("my_launch", lambda: results.append(launch(**inputs)))
    if not t.launches:
        raise Wrong("my_launch launched no kernel")
    found = about_addresses(t)
    if found:
        raise Wrong(found)
    got = _tensors(results[0], "my_launch")
    if len(got) != len(expected):
        raise Wrong(f"my_launch returned {len(got)} tensors, my_oracle {len(expected)}")
    for i, (left, right) in enumerate(zip(expected, got, strict=True)):
        name = "result" if len(got) == 1 else f"result[{i}]"
        found = difference(left.cpu(), right.cpu(), name, _tolerance(right.dtype))
        if found:
            raise Wrong(found)
    writers = about_writers(t)
    if writers:
        raise Wrong(writers)
    programs = len({(a.launch, a.program) for a in t.accesses})
    said = [f"{len(t.accesses)} accesses by {programs} programs, all inside; the oracle agrees; no two writers"]
    if t.unchecked:
        said[0] = said[0].replace("all inside", f"{t.unchecked} not checked, all others inside")
    raise Correct("; ".join([*said, *(f"note: {note}" for note in t.notes)]))


def _timed(name: str, run: Callable[[], Any], launches: bool = True) -> Any:
    """A function's trace, or its result if it must launch nothing, within the time limit."""
    results: list[Any] = []
    try:
        t = traced(lambda: results.append(run()))
    except OutOfTime:
        raise Wrong(f"{name}: no result after {SECONDS:g} s; does a loop never end?") from None
    if not launches and t.launches:
        raise Wrong(f"{name} launched {t.launches[0].kernel}; an oracle is plain torch or Python, and no kernel")
    return t if launches else results[0]


def _tolerance(dtype: torch.dtype) -> float:
    """Of a kernel's sums against torch's: none for integers, 1e-3 for FP32, 2e-2 for narrower formats."""
    if not dtype.is_floating_point:
        return 0.0
    return 1e-3 if dtype.itemsize >= 4 else 2e-2


def _tensors(value: Any, name: str) -> list[Tensor]:
    found = list(value) if isinstance(value, tuple | list) else [value]
    if not found or not all(isinstance(item, Tensor) for item in found):
        raise Wrong(f"{name} returned a {type(value).__name__}; expected a tensor, or a tuple of tensors")
    return [item.detach() if item.dtype.is_floating_point else item for item in map(torch.Tensor.clone, found)]
