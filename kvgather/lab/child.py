"""Child processes that may die, hang or print arbitrary text: the command that starts them, and their answers."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..formats.checks import check_positive

ROOT = Path(__file__).resolve().parents[2]
STARTER = "_time_limit.py"
MAX_SECONDS = 1e6
"""Longest time limit, more than 11 days: the system calls that wait count milliseconds in 32 bits."""
GRACE = 2.0
"""Seconds between a child's time limit, when its parent kills it, and the time when the child ends itself."""


class AnswerError(ValueError):
    """A child printed a line that is no answer; the message contains the line."""


def check_seconds(timeout: object, name: str = "timeout") -> float:
    """Return a time limit as a float.

    Raises:
        TypeError, ValueError: no number, or not above 0 and at most `MAX_SECONDS`.
    """
    seconds = check_positive(timeout, name, "a number of seconds")
    if seconds > MAX_SECONDS:
        raise ValueError(f"{name} is {seconds:g}; accepted: at most {MAX_SECONDS:g} seconds")
    return seconds


def command(module: str, *arguments: str, seconds: float, options: tuple[str, ...] = ()) -> list[str]:
    """The command that runs a module in this Python, without the working directory on its path.

    Args:
        module, arguments: the module to run and its command-line arguments.
        seconds: the time limit. The process ends itself `GRACE` seconds after it, even if its parent has exited.
        options: Python's own options, such as ("-X", "faulthandler").
    """
    return [
        sys.executable,
        "-P",
        *options,
        str(Path(__file__).with_name(STARTER)),
        f"{seconds + GRACE:.3f}",
        module,
        *arguments,
    ]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with this package on the path, updated with `variables`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return dict(os.environ) | {"PYTHONPATH": path} | variables


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, None if it ran out of time, and what it printed."""

    code: int | None
    stdout: str = ""
    stderr: str = ""


def run_module(module: str, *arguments: str, device: str, timeout: float, **variables: str) -> Ended:
    """Run a module in a child process. Its output goes to files: a grandchild could keep pipes open.

    Args:
        module, arguments: the module to run and its command-line arguments.
        device: "cpu" hides every GPU and enables Triton's interpreter; "cuda" changes neither.
        timeout: seconds after which the child is killed.
        variables: further variables of the child's environment.

    Raises:
        TypeError, ValueError: `timeout` is not a positive number of seconds, or exceeds 1e6 seconds; `device` is none
            of the two.
    """
    timeout = check_seconds(timeout)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r:.60}; accepted: 'cpu', 'cuda'")
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        try:
            child = subprocess.run(
                command(module, *arguments, seconds=timeout, options=("-X", "faulthandler")),
                env=_environment(device) | variables,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=timeout,
            )
            code: int | None = child.returncode
        except subprocess.TimeoutExpired:
            code = None
        return Ended(code, *(_text(stream) for stream in (stdout, stderr)))


def _text(stream: Any) -> str:
    stream.seek(0)
    text: str = stream.read().decode("utf-8", "replace")
    return text.replace(os.linesep, "\n")


def about(name: str) -> dict[str, Any]:
    """The attributes of an `Outcome` that do not depend on how the child ended."""
    return {
        "case": name,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _triton_version() -> str:
    for package in ("triton", "triton-windows"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not installed"


def _environment(device: str) -> dict[str, str]:
    """The child's environment: this package on its path; for "cpu", the interpreter enabled and GPUs hidden."""
    variables = environment()
    variables.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}
        variables.setdefault("OMP_NUM_THREADS", "1")
    return variables


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines that a child printed; lines that do not begin with a brace are skipped.

    Raises:
        AnswerError: a line begins with a brace and is no JSON object.
    """
    for line in lines:
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise AnswerError(f"the child printed {line.strip():.60}, which is no JSON object") from None


def leave_no_core() -> None:
    """Disable core files in this process, for a child that crashes on purpose."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
