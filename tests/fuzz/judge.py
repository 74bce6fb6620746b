"""Runs a call and says whether what came of it is right."""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import kvgather
from tests.fuzz.case import BAD, GOOD, Case, Facts, Wrong
from tests.fuzz.memory import Memory, tensors_in
from tests.fuzz.preamble import PREAMBLE

PACKAGE = Path(kvgather.__file__).parent
NO_MEMORY = re.compile(r"allocate memory|out of memory|Storage size|MemoryError", re.IGNORECASE)


@functools.cache
def base() -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(PREAMBLE, scope)
    return scope


@functools.cache
def raises_in(file: str) -> list[tuple[int, int]]:
    """First and last lines of the raise statements of a file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def raised_by_us(error: BaseException) -> bool:
    """Whether a raise statement of the package raised an error; others come out of a call that failed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not Path(frame.filename).is_relative_to(PACKAGE) or frame.lineno is None:
        return False
    return any(first <= frame.lineno <= last for first, last in raises_in(frame.filename))


def told(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {str(error)[:300]}"


def check_error(error: BaseException, case: Case) -> None:
    """Raise unless an error is one of ours that names an argument concerned, and was to be expected."""
    if case.large and NO_MEMORY.search(f"{type(error).__name__}: {error}"):
        return
    if not isinstance(error, (ValueError, TypeError)) or not raised_by_us(error):
        raise Wrong(f"raised no error of ours: {told(error)}") from error
    if case.verdict == GOOD:
        raise Wrong(f"refused, and is right: {told(error)}") from error
    message = str(error)
    if len(message) > 2000:
        raise Wrong(f"an error of {len(message)} characters: {told(error)}")
    if not any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) for name in case.names):
        raise Wrong(f"names none of {', '.join(sorted(case.names))}: {told(error)}") from error


def run(case: Case) -> str:
    """ "valid" or "refused".

    Raises:
        Wrong: what came of the call is not right.
    """
    scope = dict(base())
    known = set(scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec("\n".join(case.lines), scope)
            args = {name: eval(code, scope) for name, code in case.args.items()}
            callee = eval(case.callee, scope)
        except Exception as error:
            raise Wrong(f"the lines before it: {told(error)}") from error
        named = {name: value for name, value in scope.items() if name not in known} | {
            f"{name}={case.args[name]:.40}": value for name, value in args.items()
        }
        memory = Memory(named)
        warnings.simplefilter("error")
        try:
            with eval(case.surroundings, scope) if case.surroundings else contextlib.nullcontext():
                result = callee(**args)
        except Exception as error:
            check_error(error, case)
            memory.check()
            if case.after_refusal is not None:
                case.after_refusal(scope)
            return "refused"
        if case.verdict == BAD:
            raise Wrong(f"accepted, and should name one of {', '.join(sorted(case.names))}; gave {result!r:.100}")
        warnings.simplefilter("ignore")
        facts = Facts(args, scope, memory.before)
        case.check(facts, result)
        written = []
        for code in case.writes:
            value = args_or_none(code, {**scope, "args": args})
            written += list(tensors_in(value))
        memory.check(written)
    return "valid"


def args_or_none(code: str, scope: dict[str, Any]) -> Any:
    """What an expression gives; None where there is no such argument in this call."""
    try:
        return eval(code, scope)
    except (AttributeError, KeyError, TypeError, IndexError):
        return None
