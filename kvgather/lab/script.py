"""A script, run in this process as `python SCRIPT ARGUMENTS…` would run it, and its traceback without our frames."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["ScriptError", "check_script", "format_exception", "run_in_place"]

OURS = str(Path(__file__).resolve().parents[1]) + os.sep
FOLDERS = tuple(os.path.join(OURS, name, "") for name in ("lab", "cli"))
FILES = {OURS + name for name in ("__main__.py", "interpreter.py")}
"""Code of this package whose frames are left out of a traceback."""


class ScriptError(ValueError):
    """A path is not that of a file; the message names it."""


def check_script(path: Path | str) -> Path:
    """A script's absolute path.

    Raises:
        TypeError: `path` is no path.
        ScriptError: no file is there.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"script is {type(path).__name__}; accepted: the path of a Python file")
    script = Path(path).absolute()
    if not script.is_file():
        came = "a folder" if script.is_dir() else "missing"
        raise ScriptError(f"script is {os.fspath(path)!r}, which is {came}; accepted: the path of a Python file")
    return script


def run_in_place(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as `__main__`, with its own arguments, and its folder first on the path.

    Arguments and path are restored afterwards. Exceptions of the script, SystemExit among them, pass through.
    """
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = argv
        sys.path[:] = path


def format_exception(error: BaseException) -> str:
    """An exception's traceback as Python prints it, without the frames that run the script or trace it."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = _without_ours(link.__traceback__)
            chain += [link.__cause__, link.__context__]
    return "".join(traceback.format_exception(error))


def _without_ours(frames: TracebackType | None) -> TracebackType | None:
    """A traceback without frames of this package's tools, of runpy, and of the patched interpreter's wrappers."""
    if frames is None:
        return None
    rest = _without_ours(frames.tb_next)
    file = frames.tb_frame.f_code.co_filename
    if file in ("<frozen runpy>", runpy.__file__) or file.startswith(FOLDERS) or file in FILES:
        return rest
    return TracebackType(rest, frames.tb_frame, frames.tb_lasti, frames.tb_lineno)
