"""Why a child process died: its exit status, and the line of a kernel in the traceback that faulthandler printed."""

from __future__ import annotations

import linecache
import os
import re
import signal
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
