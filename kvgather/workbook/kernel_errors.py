"""An error inside a Triton kernel in four lines: the kernel and program, the line, the cause, and advice.

Triton's interpreter raises `InterpreterError`, whose own message lacks the line, and whose traceback has some 60 lines
of Triton's files around the reader's one. In a notebook, `short_tracebacks` shows the four lines instead.
"""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from IPython.core.getipython import get_ipython

__all__ = ["KernelError", "explain", "kernel_error", "short_tracebacks"]

# Messages of Triton (3.6 to 3.9) that do not name what the reader has to change.
ADVICE = (
    (r"invalid operands of type pointer<\S+> and \S*float", "an offset is an integer: // divides, / gives a float"),
    (r"invalid operands of type pointer", "a pointer takes an offset; tl.load(pointer + offset) gives a number"),
    (r"range must be a power of 2", "round the lanes up with triton.next_power_of_2, and mask those beyond the end"),
    (r"must be of type tl\.constexpr", "declare the parameter as NAME: tl.constexpr"),
    (r"'torch\.dtype' object", "a kernel's dtypes are those of Triton, such as tl.float32"),
    (r"'(numpy\.ndarray|list|tuple)' object has no attribute 'type'", "a kernel's arguments are tensors and numbers"),
    (r"'int' object is not iterable", "a pointer has no index: tl.load(pointer + offset)"),
    (r"cannot cast \[.*\] to|[Uu]nsupported ptr type", "tl.load takes addresses and gives values; tl.store takes both"),
    (r"truth value of an array", "`if` needs one value; for a choice in each lane use mask= or tl.where"),
)
LAUNCH = "launch a kernel with its grid: kernel[grid](…)"


@dataclass(frozen=True)
class KernelError:
    """An error inside a kernel.

    Attributes:
        kernel: name of the function that raised, the kernel or a function that it calls.
        program: the program's index, without trailing axes of size 1; empty if there was no launch.
        file, line: the source line in the innermost function outside Triton.
        source: the line's text, or "" if the file cannot be read.
        cause: the exception that Triton caught.
    """

    kernel: str
    program: tuple[int, ...]
    file: str
    line: int
    source: str
    cause: BaseException

    @property
    def message(self) -> str:
        """Type and first line of the cause."""
        text = str(self.cause).strip().split("\n")[0]
        return f"{type(self.cause).__name__.removesuffix('Impl')}" + (f": {text}" if text else "")

    @property
    def advice(self) -> str:
        """What to change, for the causes that Triton describes without it; else ""."""
        if not self.program:
            return LAUNCH
        text = str(self.cause)
        return next((advice for pattern, advice in ADVICE if re.search(pattern, text, flags=re.S)), "")

    def __str__(self) -> str:
        index = ", ".join(map(str, self.program)) + ("," if len(self.program) == 1 else "")
        lines = [
            f"{self.kernel} stopped" + (f" in program ({index})" if self.program else " without a launch"),
            f"{_place(self.file)}, line {self.line}:  {self.source}".rstrip(": "),
            self.message,
        ]
        return "\n".join(lines + ([f"→ {self.advice}"] if self.advice else []))


def kernel_error(error: BaseException) -> KernelError | None:
    """Locate an error of Triton's interpreter; None for any other error."""
    if type(error).__name__ != "InterpreterError":
        return None
    frames: list[tuple[FrameType, int]] = []
    cause = error
    while True:
        frames += _frames(cause.__traceback__)
        if type(cause).__name__ != "InterpreterError" or cause.__cause__ is None:
            break
        cause = cause.__cause__
    inside = [(frame, line) for frame, line in _frames(cause.__traceback__) if not _is_machinery(frame)]
    if not inside:
        return None
    frame, line = inside[-1]
    file = frame.f_code.co_filename
    source = linecache.getline(file, line).strip()
    return KernelError(frame.f_code.co_name, _program([frame for frame, _ in frames]), file, line, source, cause)


def explain(error: BaseException) -> str:
    """The error as text: the lines of a `KernelError`, or type and message of any other exception."""
    found = kernel_error(error)
    return str(found) if found else "".join(traceback.format_exception_only(error)).strip()


def short_tracebacks() -> None:
    """In a notebook, show an error of Triton's interpreter as `explain` does. Outside of one this has no effect."""
    shell = get_ipython()
    if shell is None or "triton" not in sys.modules:
        return
    from triton.runtime.errors import InterpreterError

    def handler(shell: Any, kind: type, error: BaseException, tb: TracebackType, tb_offset: int | None = None) -> Any:
        found = kernel_error(error)
        if found is None:
            lines = shell.InteractiveTB.structured_traceback(kind, error, tb, tb_offset=tb_offset)
        else:
            lines = str(found).split("\n")
            error = type(error)(found.message)
        shell._showtraceback(kind, error, lines)
        return lines

    shell.set_custom_exc((InterpreterError,), handler)


def _frames(tb: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    return traceback.walk_tb(tb)


def _is_machinery(frame: FrameType) -> bool:
    """Whether a frame belongs to Triton, or to the trace's hooks inside Triton."""
    module = str(frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in ("triton", "numpy") or module.startswith(("kvgather.lab.trace", "kvgather.lab._"))


def _program(frames: list[FrameType]) -> tuple[int, ...]:
    """The index of the program that ran in the interpreter's loop over the grid."""
    for frame in frames:
        names = frame.f_locals
        if frame.f_code.co_name == "__call__" and {"grid", "x", "y", "z"} <= names.keys():
            axes = max((axis for axis, size in enumerate(names["grid"], start=1) if size != 1), default=1)
            return tuple(int(names[axis]) for axis in "xyz"[:axes])
    return ()


def _place(file: str) -> str:
    """A cell as Jupyter counts it ("Cell In[4]"), or a file's name."""
    shell = get_ipython()
    named = shell.compile.format_code_name(file) if shell is not None else None
    return " ".join(named) if named else file.replace("\\", "/").rsplit("/", 1)[-1]
