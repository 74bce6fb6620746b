"""Why a child process died: its exit status, and the line of a kernel in the traceback that faulthandler printed."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import os
import re
import signal
import sysconfig
from pathlib import Path
from typing import Any

from .child import ROOT, STARTER

ACCESS_VIOLATION = 0xC0000005  # Windows' exit status for a segmentation fault


def died(exit_code: int) -> bool:
    """Whether an exit status means that a signal or an access violation ended the process."""
    return exit_code < 0 or exit_code == ACCESS_VIOLATION


def diagnosis(exit_code: int, stderr: str) -> dict[str, Any]:
    """The attributes of an `Outcome` for a child that did not finish: kind, and source line or message.

    Args:
        exit_code: the child's exit status.
        stderr: the child's standard error, with the traceback that faulthandler prints.
    """
    if exit_code in (-signal.SIGSEGV, -getattr(signal, "SIGBUS", signal.SIGSEGV), ACCESS_VIOLATION):
        return {"kind": "segfault", **source_line(stderr)}
    if exit_code == -signal.SIGABRT:
        return {"kind": "abort", **source_line(stderr)}
    last = [line for line in stderr.strip().splitlines() if line.strip()][-1:]
    return {"kind": "failed", "message": last[0] if last else f"exit {exit_code} with no output"}


def source_line(stderr: str) -> dict[str, Any]:
    """File, line and source of the innermost frame in this package; faulthandler prints the innermost frame first."""
    package = as_faulthandler_prints(str(ROOT / "kvgather") + os.sep)
    for file, line in re.findall(r'^\s*File "(.+?)", line (\d+)', stderr, re.MULTILINE):
        if file.startswith(package) and not file.endswith(STARTER):
            path = ROOT / "kvgather" / file.removeprefix(package)
            source = linecache.getline(str(path), int(line)).strip()
            return {"file": path.relative_to(ROOT).as_posix(), "line": int(line), "source": source}
    return {}


def callers_line(stderr: str) -> dict[str, Any]:
    """File, line and source of the innermost frame outside Python's and installed packages and outside our tools."""
    for file, line in re.findall(r'^\s*File "(.+?)", line (\d+)', stderr, re.MULTILINE):
        path = _as_written(file)
        if not path.startswith(("<", *_not_callers())):
            source = linecache.getline(path, int(line)).strip()
            return {"file": path, "line": int(line), "source": source}
    return {}


@functools.cache
def _not_callers() -> tuple[str, ...]:
    """Where frames are not the caller's: the standard library, installed packages, and what runs or traces the code."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for package in ("triton", "torch", "numpy"):  # may be on the path without being installed
        spec = importlib.util.find_spec(package)
        folders += list(spec.submodule_search_locations or ()) if spec is not None else []
    tools = (STARTER, "_isolated_child.py", "_interpreter.py", "_launch.py", "_recorder.py", "script.py")
    own = [str(Path(__file__).with_name(name)) for name in tools]
    return (*(os.path.join(folder, "") for folder in folders), *own)


def _as_written(path: str) -> str:
    """The inverse of `as_faulthandler_prints`."""
    escape = r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})"
    return re.sub(escape, lambda match: chr(int(match[match.lastindex or 0], 16)), path)


def as_faulthandler_prints(path: str) -> str:
    """A path in printable ASCII: a signal handler cannot encode text, so faulthandler escapes every other character."""
    printed = ""
    for character in path:
        code = ord(character)
        if 32 <= code < 127:
            printed += character
        else:
            printed += f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return printed
