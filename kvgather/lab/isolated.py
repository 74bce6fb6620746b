"""A function or a script in a child process that may crash or hang: this process gets the outcome.

A general tool, for a kernel with fenced arguments (`kvgather.lab.fence`), which end their process on purpose:

    from kvgather.lab.isolated import run_function

    def experiment(n):
        my_kernel[grid](x, fenced(scale), out, n)

    print(run_function(experiment, 64))  # segfault (exit -11) at kernel.py:93

`run_script("two.py")` runs a file, and `run_code` source text, for a notebook.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .child import about, run_module
from .faults import callers_line, diagnosis
from .outcome import Outcome
from .script import check_script

__all__ = ["run_code", "run_function", "run_script"]

CHILD = "kvgather.lab._isolated_child"


def run_function(
    function: Callable[..., object], *arguments: object, name: str = "", device: str = "cpu", timeout: float = 120.0
) -> Outcome:
    """Call a function in a child process of its own, and return the outcome.

    The child imports the function, as `multiprocessing` does: it must be at the top level of a module or of a script,
    and the script's own actions belong under `if __name__ == "__main__":`. What the function returns is discarded; what
    it prints is the outcome's `output`. Fences do not survive as arguments: call `fenced` in the function.

    Args:
        function: called with `arguments`.
        arguments: passed to the child as copies, by pickle.
        name: the outcome's `case`; the function's name if empty.
        device: "cpu" hides every GPU and enables Triton's interpreter; "cuda" changes neither.
        timeout: seconds after which the child is killed. The child ends itself if this process has exited by then.

    Returns:
        An outcome of kind "ok", "segfault", "abort", "timeout" or "failed" (an exception, another exit status or
        signal; `message` is the last line of stderr), with the line of the caller's code that crashed.

    Raises:
        TypeError: a child cannot import the function, or cannot be given the arguments.
        TypeError, ValueError: `timeout` is not a positive number of seconds, or exceeds 1e6 seconds; `device` is none
            of the two.
    """
    if not callable(function):
        raise TypeError(f"function is {type(function).__name__}; accepted: a function")
    label = str(getattr(function, "__qualname__", type(function).__name__))
    main = _main_of(function, label)
    try:
        payload = pickle.dumps((function, arguments))
    except Exception as error:  # pickle, and each type's own reduction, raise their own errors
        raise TypeError(
            f"a child process cannot be given {label}() with these arguments ({error}); accepted: a function at the "
            f"top level of a module or script, and arguments that pickle copies"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "call.pickle"
        file.write_bytes(pickle.dumps((list(sys.path), main, payload)))
        return _isolated("function", str(file), name=name or label, device=device, timeout=timeout)


def run_script(
    path: Path | str, *arguments: str, name: str = "", device: str = "cpu", timeout: float = 120.0
) -> Outcome:
    """Run a script in a child process of its own, as `python SCRIPT ARGUMENTS…` would, and return the outcome.

    Args:
        path: a Python file.
        arguments: the script's command-line arguments.
        name: the outcome's `case`; the file's name if empty.
        device, timeout: as for `run_function`.

    Returns:
        As `run_function`. A script that exits with a status other than 0 is "failed".

    Raises:
        ScriptError: no file is at `path`.
        TypeError, ValueError: as `run_function`; an argument is no string.
    """
    script = check_script(path)
    for argument in arguments:
        if not isinstance(argument, str):
            raise TypeError(f"arguments have a {type(argument).__name__}; accepted: strings")
    return _isolated("script", str(script), *arguments, name=name or script.name, device=device, timeout=timeout)


def run_code(code: str, *arguments: str, name: str = "code.py", device: str = "cpu", timeout: float = 120.0) -> Outcome:
    """Run source text as a script in a child process of its own; see `run_script`. The outcome's `file` is `name`.

    Raises:
        TypeError, ValueError: `code` is no string; as `run_script`.
    """
    if not isinstance(code, str):
        raise TypeError(f"code is {type(code).__name__}; accepted: a string of Python source")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "code.py"
        script.write_text(code, encoding="utf-8")
        outcome = run_script(script, *arguments, name=name, device=device, timeout=timeout)
    return outcome.renamed(str(script), name)


def _isolated(*arguments: str, name: str, device: str, timeout: float) -> Outcome:
    """The outcome of a caller's code, whose output has no meaning to us."""
    end = run_module(CHILD, *arguments, device=device, timeout=timeout)
    attributes = about(name) | {"output": end.stdout, "exit_code": end.code, "device": device}
    if end.code is None:
        return Outcome(kind="timeout", message=f"no answer in {timeout:g} s", **attributes)
    if end.code == 0:
        return Outcome(kind="ok", **attributes)
    found = diagnosis(end.code, end.stderr)
    if found["kind"] in ("segfault", "abort"):
        found = {"kind": found["kind"]} | callers_line(end.stderr)
    return Outcome(**attributes | found)


def _main_of(function: Any, label: str) -> tuple[str, str] | None:
    """How a child gets the main module that a function is from: ("path", file), ("module", name), or None."""
    if getattr(function, "__module__", None) != "__main__":
        return None
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return "module", spec.name
    file = getattr(main, "__file__", None)
    if file is None:
        raise TypeError(
            f"{label}() is from a notebook or a prompt, where a child process cannot import it; accepted: a function "
            f"in a file, or source text for run_code"
        )
    return "path", str(Path(file).absolute())
