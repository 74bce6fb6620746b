"""Whether Triton kernels are compiled for a GPU or run in Triton's interpreter on a CPU.

On a machine without a GPU, the import of this module enables Triton's interpreter, unless TRITON_INTERPRET is set or
triton was imported before. Triton reads the setting when a kernel is decorated; the kernels of its own library are
decorated when triton is imported. The setting applies to this process only: child processes do not inherit it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch


class BackendError(ValueError):
    """The requested backend cannot run on this machine; the message gives the cause and the fix."""


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU (NVIDIA or AMD)."""
    return torch.cuda.is_available()


# Looked up once: torch.compile cannot trace find_spec, and every launch needs the result.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None

INTERPRET = "TRITON_INTERPRET"
_import_error = ""


def triton_available() -> bool:
    """Whether triton is installed (it has no macOS build) and can be imported."""
    return _HAS_TRITON and not _import_error


def why_no_triton() -> str:
    """Why `triton_available` is False: the error of the import, or "triton is not installed"."""
    return _import_error or "triton is not installed"


def _enable_interpreter() -> bool:
    """Import triton with its interpreter enabled if no GPU exists and the user has made no choice.

    The variable alone applies to the kernels of Triton's library, and the knob alone to kernels that are decorated
    later. Once the knob is set, the variable can be removed, so that no child process inherits it (Triton 3.6 to 3.9).

    Returns:
        Whether the interpreter was enabled.
    """
    global _import_error
    undecided = INTERPRET not in os.environ and "triton" not in sys.modules
    if has_gpu() or not (_HAS_TRITON and _HAS_NUMPY and undecided):
        return False
    os.environ[INTERPRET] = "1"
    try:
        from triton import knobs

        knobs.runtime.interpret = True
    except Exception as error:  # an incompatible build of triton: everything that needs torch alone still works
        _import_error = f"{type(error).__name__}: {error}"
        return False
    finally:
        os.environ.pop(INTERPRET, None)
    return True


_enabled_here = _enable_interpreter()


_active_traces = 0


@contextlib.contextmanager
def interpreted_meanwhile() -> Iterator[None]:
    """Context manager in which `interpreting` is True, for a tool that runs compiled kernels in the interpreter."""
    global _active_traces
    _active_traces += 1
    try:
        yield
    finally:
        _active_traces -= 1


def interpreting() -> bool:
    """Whether a kernel launched now runs in Triton's interpreter, together with the functions of Triton's library."""
    if _active_traces:
        return True
    if not triton_available() or not _library_is_interpreted():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


_library_interpreted: bool | None = None


def _library_is_interpreted() -> bool:
    """Whether the functions of Triton's library were decorated for the interpreter when triton was imported.

    Looked up once, because every launch needs the result. `functools.cache` would make torch.compile warn.
    """
    global _library_interpreted
    if _library_interpreted is None:
        if not _HAS_NUMPY:  # the interpreter imports NumPy
            return False
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        function: Any = tl.cdiv
        _library_interpreted = isinstance(function, InterpretedFunction)
    return _library_interpreted


def why_not_interpreting() -> tuple[str, str]:
    """Why kernels cannot run in the interpreter on a machine without a GPU, and the fix."""
    if not _HAS_NUMPY:
        return "the interpreter needs NumPy, which is not installed", "install NumPy"
    from triton import knobs

    if not knobs.runtime.interpret:
        if _enabled_here:  # and disabled later, by the knob, which also sets the variable
            return "triton.knobs.runtime.interpret was set to False", "set triton.knobs.runtime.interpret to True"
        if INTERPRET in os.environ:
            value = os.environ[INTERPRET]
            return f"{INTERPRET} is {value!r}", f"unset {INTERPRET}, or set it to 1, before Python starts"
    return (
        "triton was imported before its interpreter was switched on",
        f"import kvgather before triton, or set {INTERPRET}=1 before Python starts",
    )


def require_triton(
    device: torch.device, request: str = 'backend="triton"', accepted: str = '"torch" or "auto"'
) -> None:
    """Raise unless Triton kernels can run on tensors of `device`.

    Args:
        device: the device of the launch's tensors.
        request: the argument that needs Triton, as the caller wrote it.
        accepted: the other values of that argument.

    Raises:
        BackendError: kernels cannot run on `device`. The message gives the cause: triton or NumPy is missing, triton
            was imported before its interpreter was enabled, the interpreter is disabled, or the tensors are on a CPU
            while kernels are compiled for a GPU.
    """
    if not triton_available():
        cause = f"cannot be imported here ({_import_error})" if _import_error else "is not installed here"
        raise BackendError(f"{request} needs triton, which {cause}; accepted: {accepted}")
    if device.type == "cuda" or interpreting():
        return
    if has_gpu():
        raise BackendError(
            f"{request} got tensors on {device}, and kernels are compiled for the GPU here; accepted: {accepted}, "
            f"tensors on the GPU, or {INTERPRET}=1 set before Python starts"
        )
    cause, remedy = why_not_interpreting()
    raise BackendError(
        f"{request} needs Triton's interpreter on a machine with no GPU, and {cause}; accepted: {accepted}, or {remedy}"
    )
