"""The crash, safely: each case of `kvgather.lab.outcome` runs one gather in a child process of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from ..device import has_gpu
from .child import ROOT, AnswerError, about, answers, leave_no_core, run_module
from .faults import ACCESS_VIOLATION, diagnosis, died
from .outcome import CASES, KINDS, RECORDED, Case, CrashError, Outcome, as_json, describe, recorded, save

__all__ = [
    "ACCESS_VIOLATION",
    "CASES",
    "KINDS",
    "RECORDED",
    "ROOT",
    "Case",
    "CrashError",
    "Outcome",
    "as_json",
    "describe",
    "leave_no_core",
    "names",
    "recorded",
    "run",
    "run_all",
    "run_child",
    "save",
]


def names(device: str = "all") -> list[str]:
    """The names of the cases of a device.

    Args:
        device: "cpu", "cuda", or "all" for every case that this machine can run.

    Raises:
        CrashError: `device` is none of these, or it is "cuda" and this machine has no GPU.
    """
    if device not in ("cpu", "cuda", "all"):
        raise CrashError(f"device is {device!r}; accepted: 'cpu', 'cuda', 'all'")
    if device == "cuda" and not has_gpu():
        raise CrashError("device is 'cuda', and torch sees no GPU here; accepted: 'cpu'")
    return [
        name
        for name, case in CASES.items()
        if case.device == device or (device == "all" and (case.device == "cpu" or has_gpu()))
    ]


def run(case: Case | str, *, timeout: float = 120.0) -> Outcome:
    """Run one case in a child process of its own.

    Args:
        case: a `Case`, or the name of one.
        timeout: seconds after which the child is killed.

    Raises:
        CrashError: the case does not exist, or it needs a GPU and this machine has none.
        TypeError, ValueError: `timeout` is not a positive number of seconds, or exceeds 1e6 seconds.
    """
    name = case if isinstance(case, str) else case.name
    if name not in CASES:
        raise CrashError(f"case is {name!r}; accepted: {', '.join(CASES)}")
    case = CASES[name]
    if case.device == "cuda" and not has_gpu():
        raise CrashError(f"case {name!r} needs a GPU, and torch sees none here; accepted: the cases that end in /cpu")
    return run_child(
        "kvgather.lab._crash_child",
        case.kernel,
        case.scale,
        case.placement,
        case.device,
        name=name,
        device=case.device,
        timeout=timeout,
    )


def run_child(module: str, *arguments: str, name: str = "", device: str = "cpu", timeout: float = 120.0) -> Outcome:
    """Run `python -m module arguments…` in a child process, and return its outcome.

    The child may print JSON objects, one a line. Their keys are attributes of `Outcome` other than `case`, `exit_code`
    and `output`, and their values become those of the outcome. A child that prints no "kind" and exits with status 0
    is ok. A child that exits by itself after printing any other line that begins with a brace has failed.

    Args:
        module, arguments: the module to run and its command-line arguments.
        name: the outcome's `case`; the module's name if empty.
        device: "cpu" hides every GPU and enables Triton's interpreter; "cuda" changes neither.
        timeout: seconds after which the child is killed. The child ends itself if this process has exited by then.

    Raises:
        TypeError, ValueError: `timeout` is not a positive number of seconds, or exceeds 1e6 seconds; `device` is none
            of the two.
    """
    end = run_module(module, *arguments, device=device, timeout=timeout)
    attributes = about(name or module)
    if end.code is None:
        return Outcome(kind="timeout", message=f"no answer in {timeout:g} s", **attributes)
    wrong_answer = ""
    try:
        for answer in answers(iter(end.stdout.splitlines())):
            attributes |= _checked(answer)
    except AnswerError as error:
        wrong_answer = str(error)
    attributes["exit_code"] = end.code
    if wrong_answer and end.code >= 0:
        return Outcome(**attributes | {"kind": "failed", "message": wrong_answer})
    if end.code == 0:
        attributes.setdefault("kind", "ok")
    if died(end.code) or "kind" not in attributes:
        attributes |= diagnosis(end.code, end.stderr)
    return Outcome(**attributes)


def run_all(cases: Iterable[str], *, timeout: float = 120.0) -> Iterator[Outcome]:
    """Run cases and yield their outcomes in order. CPU cases run two at a time, unless one case needs a GPU.

    Args:
        cases: the names of the cases.
        timeout: seconds after which the child of a case is killed.
    """
    cases = list(cases)
    with ThreadPoolExecutor(1 if any(name.endswith("/cuda") for name in cases) else 2) as pool:
        yield from pool.map(lambda name: run(name, timeout=timeout), cases)


_TYPES = {"str": str, "int": int, "float | None": float}
_ANSWER_TYPES = {f.name: _TYPES[str(f.type)] for f in fields(Outcome) if f.name not in ("case", "exit_code", "output")}


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The child's answer with its values converted to the types of `Outcome`'s attributes.

    Raises:
        AnswerError: a key is no attribute of an outcome, or a value has another type.
    """
    attributes: dict[str, Any] = {}
    for key, value in answer.items():
        if key not in _ANSWER_TYPES:
            raise AnswerError(f"the child printed the key {key!r:.40}; accepted: {', '.join(_ANSWER_TYPES)}")
        try:
            attributes[key] = _ANSWER_TYPES[key](value)
        except (TypeError, ValueError, OverflowError):
            accepted = _ANSWER_TYPES[key].__name__
            raise AnswerError(f"the child printed {key}: {value!r:.40}; accepted: {accepted}") from None
    if attributes.get("kind", KINDS[0]) not in KINDS:
        raise AnswerError(f"the child printed kind: {attributes['kind']!r:.40}; accepted: {', '.join(KINDS)}")
    return attributes
