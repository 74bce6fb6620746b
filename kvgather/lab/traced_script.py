"""An unchanged script under a trace: `kvgather trace SCRIPT.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..device import has_gpu
from .script import check_script, format_exception, run_in_place
from .trace import Trace, trace

__all__ = ["TracedScript", "run_traced"]

NO_GPU = re.compile(
    "not compiled with CUDA|Found no NVIDIA driver|No (CUDA|HIP) GPUs are available|Cannot access accelerator device"
    "|0 active drivers"
)
"""What torch and triton say to code that wants a GPU where there is none."""


@dataclass(frozen=True)
class TracedScript:
    """A script's trace, and how the script ended.

    Attributes:
        script: the file.
        trace: all launches until the end.
        failure: "" if the script ended without an error; its traceback, without our frames; or the status with which
            it exited, if that is not 0.
        wants_gpu: whether it failed because it asks for a GPU and this machine has none.
        interrupted: whether Ctrl-C ended it.
    """

    script: Path
    trace: Trace
    failure: str = ""
    wants_gpu: bool = False
    interrupted: bool = False

    @property
    def clean(self) -> bool:
        """Whether the trace has nothing to report."""
        return not (self.trace.groups or self.trace.races or self.trace.unwritten)


def run_traced(
    script: Path | str, arguments: Sequence[str] = (), *, strict: bool | None = None, unwritten: bool = False
) -> TracedScript:
    """Run a script in this process, as `python SCRIPT ARGUMENTS…` would, and trace every kernel that it launches.

    Kernels run in Triton's interpreter. Those that the script launches in other processes are not seen.

    Args:
        script: a Python file.
        arguments: its command-line arguments.
        strict, unwritten: as for `trace`.

    Raises:
        ScriptError: no file is at `script`.
        TraceError: triton is missing or cannot be hooked.
    """
    file = check_script(script)
    failure, wants_gpu, interrupted = "", False, False
    with trace(strict=strict, unwritten=unwritten) as result:
        try:
            run_in_place(file, arguments)
        except KeyboardInterrupt:
            interrupted = True
        except SystemExit as end:
            failure = _exit_status(end)
        except BaseException as error:  # whatever ends a script
            wants_gpu = not has_gpu() and _wants_gpu(error)
            failure = format_exception(error)
    return TracedScript(file, result, failure, wants_gpu, interrupted)


def _exit_status(end: SystemExit) -> str:
    """The message of `sys.exit`, or the status; "" for success."""
    if end.code is None or end.code == 0:
        return ""
    if isinstance(end.code, int):
        return f"the script exited with status {end.code}"
    return f"{end.code}" or "the script exited with status 1"  # as Python does after an empty message


def _wants_gpu(error: BaseException | None) -> bool:
    seen = 0
    while error is not None and seen < 100:
        if NO_GPU.search(str(error)):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
