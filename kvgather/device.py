"""Where kernels run: on a GPU, or in Triton's interpreter on a machine that has none.

Importing this module on a machine with no GPU switches Triton's interpreter on, unless TRITON_INTERPRET is set or
triton was imported before: Triton chooses when a kernel is decorated, its own library's kernels at its import. The
choice holds for this process; child processes do not inherit it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


class BackendError(ValueError):
    """A backend was asked for that cannot run here; the message says why and what to do."""


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU (NVIDIA or AMD)."""
    return torch.cuda.is_available()


# Looked up once: torch.compile cannot look into find_spec, and every launch asks.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None

INTERPRET = "TRITON_INTERPRET"
_import_error = ""


def triton_available() -> bool:
    """Whether triton is installed (it is not on macOS) and can be imported."""
    return _HAS_TRITON and not _import_error


def _interpret_by_default() -> bool:
    """Import triton with its interpreter on where no GPU exists and nobody has chosen; returns whether it did.

    The variable alone reaches the kernels of Triton's library, and the knob alone kernels decorated later. With the
    knob set the variable can go, before a child process inherits it (Triton 3.6 to 3.9).
    """
    global _import_error
    undecided = INTERPRET not in os.environ and "triton" not in sys.modules
    if has_gpu() or not (_HAS_TRITON and _HAS_NUMPY and undecided):
        return False
    os.environ[INTERPRET] = "1"
    try:
        from triton import knobs

        knobs.runtime.interpret = True
    except Exception as error:  # a triton that does not fit this machine: everything else still works
        _import_error = f"{type(error).__name__}: {error}"
        return False
    finally:
        os.environ.pop(INTERPRET, None)
    return True


_switched_on = _interpret_by_default()


_interpreted_meanwhile = 0


@contextlib.contextmanager
def interpreted_meanwhile() -> Iterator[None]:
    """Say that kernels run in the interpreter: for a tool that sends those compiled for a GPU there too."""
    global _interpreted_meanwhile
    _interpreted_meanwhile += 1
    try:
        yield
    finally:
        _interpreted_meanwhile -= 1


def interpreting() -> bool:
    """Whether kernels launched now run in Triton's interpreter, Triton's own library included."""
    if _interpreted_meanwhile:
        return True
    if not triton_available() or not _library_interpreted():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


_library: bool | None = None


def _library_interpreted() -> bool:
    """Whether Triton's own functions were decorated for the interpreter, which was when triton was imported.

    Looked up once, every launch asks; and not by `functools.cache`, which torch.compile warns of.
    """
    global _library
    if _library is None:
        if not _HAS_NUMPY:  # the interpreter is built on it
            return False
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        function: Any = tl.cdiv
        _library = isinstance(function, InterpretedFunction)
    return _library


def _why_not_interpreted() -> tuple[str, str]:
    """Why kernels cannot run in the interpreter on a machine with no GPU, and what to do about it."""
    if not _HAS_NUMPY:
        return "the interpreter needs NumPy, which is not installed", "install NumPy"
    from triton import knobs

    if not knobs.runtime.interpret:
        if _switched_on:  # and off again: the knob also sets the variable
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
        device: where the tensors of the launch are.
        request: the argument that needs Triton, as the caller wrote it.
        accepted: what that argument may be instead.

    Raises:
        BackendError: kernels cannot run on `device` here. The message names the cause: triton or NumPy is missing,
            triton was imported before its interpreter was switched on, the interpreter is switched off, or the tensors
            are on a CPU while kernels are compiled for a GPU.
    """
    if not triton_available():
        why = f"cannot be imported here ({_import_error})" if _import_error else "is not installed here"
        raise BackendError(f"{request} needs triton, which {why}; accepted: {accepted}")
    if device.type == "cuda" or interpreting():
        return
    if has_gpu():
        raise BackendError(
            f"{request} got tensors on {device}, and kernels are compiled for the GPU here; accepted: {accepted}, "
            f"tensors on the GPU, or {INTERPRET}=1 set before Python starts"
        )
    cause, remedy = _why_not_interpreted()
    raise BackendError(
        f"{request} needs Triton's interpreter on a machine with no GPU, and {cause}; accepted: {accepted}, or {remedy}"
    )


def parse_device(device: object, name: str = "device") -> torch.device:
    """A device or the name of one as a `torch.device`; whether this machine has it is not looked at.

    Raises:
        TypeError, ValueError: neither a device nor the name of one; the message begins with `name`.
    """
    accepted = "accepted: a torch.device or its name: cpu, cuda, cuda:0, …"
    if not isinstance(device, (str, torch.device)):
        try:
            came = f"{device!r:.60}"
        except ValueError:  # Python refuses to print integers of more than 4300 digits
            came = "of too many digits to print"
        raise TypeError(f"{name} is {type(device).__name__} {came}; {accepted}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name} is {device!r:.60}; {accepted}") from None


def resolve_device(device: torch.device | str | None = None, name: str = "device") -> torch.device:
    """The device that an argument means, checked to be one that holds tensors here.

    Args:
        device: a device or its name; None is the GPU if there is one, else the CPU.
        name: the argument's name, for errors.

    Raises:
        TypeError, ValueError: no device, one that this machine does not have, or "meta", which holds no values.
    """
    if device is None:
        return torch.device("cuda" if has_gpu() else "cpu")
    where = parse_device(device, name)
    if where.type == "cuda":
        count = torch.cuda.device_count() if has_gpu() else 0
        if (where.index or 0) >= count:
            raise ValueError(f"{name} is {where}, and torch sees {count} GPUs here; accepted: one of those, or cpu")
    elif where.type == "meta":
        raise ValueError(f"{name} is meta, which holds no values; accepted: a GPU, or cpu")
    elif where.type != "cpu":
        try:
            torch.empty(0, device=where)
        except Exception as error:  # each backend has its own way to say that it is not there
            words = str(error).splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"{name} is {where}, which torch cannot use here ({words[0]:.100})") from None
    return where


def fp8_support(device: torch.device | str | None = None) -> dict[torch.dtype, str]:
    """How FP8 codes are decoded on a device: by the hardware, or in software from integers.

    Args:
        device: a torch device; None is the GPU if there is one, else the CPU.

    Returns:
        For each FP8 dtype "hardware" or "software". Software decode is exact for all 256 codes. It is always used
        under Triton's interpreter, whose own conversions get NaN codes wrong.

    Raises:
        TypeError, ValueError: `device` is no device, or a GPU that torch does not see.

    Source: NVIDIA has e4m3 and e5m2 from compute capability 8.9; AMD gfx942 has the fnuz forms, gfx950 and RDNA4
        the OCP ones.
    """
    where = resolve_device(None) if device is None else parse_device(device)
    decoded: frozenset[torch.dtype] = frozenset()
    if where.type == "cuda" and not interpreting():
        decoded = fp8_in_hardware(*_architecture(where))
    return {dtype: "hardware" if dtype in decoded else "software" for dtype in FP8_DTYPES}


def _architecture(gpu: torch.device) -> tuple[str, str]:
    """The backend and the architecture of a GPU, as `fp8_in_hardware` takes them."""
    try:
        if torch.version.hip is not None:
            return "hip", torch.cuda.get_device_properties(gpu).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(gpu)
    except (AssertionError, RuntimeError) as error:
        words = str(error).splitlines()[0]
        raise ValueError(f"device is {gpu}; accepted: a GPU that torch sees here, or cpu ({words:.100})") from None
    return "cuda", f"{major}{minor}"


def fp8_in_hardware(backend: str, arch: str) -> frozenset[torch.dtype]:
    """The FP8 dtypes that an architecture decodes itself.

    Args:
        backend: "cuda" or "hip".
        arch: a compute capability without its dot ("90", "120"), or a name such as "gfx942".

    Raises:
        TypeError, ValueError: `backend` is another one, or `arch` is no architecture of it.
    """
    for name, word in (("backend", backend), ("arch", arch)):
        if not isinstance(word, str):
            raise TypeError(f"{name} is {type(word).__name__}; accepted: a string")
    if backend not in ("cuda", "hip"):
        raise ValueError(f"backend is {backend!r:.60}; accepted: cuda, hip")
    if backend == "cuda" and not re.fullmatch("[0-9]{2,4}", arch):
        raise ValueError(f"arch is {arch!r:.60}; accepted for cuda: a compute capability without its dot, such as 90")
    if backend == "cuda":
        ocp, fnuz = int(arch) >= 89, False
    else:
        ocp, fnuz = arch.startswith(("gfx950", "gfx12")), arch.startswith("gfx94")
    dtypes = [torch.float8_e4m3fn, torch.float8_e5m2] if ocp else [torch.float8_e4m3fnuz] if fnuz else []
    return frozenset(dtypes)


@dataclass(frozen=True)
class Report:
    """What this machine can run; `str()` of it is the table that `kvgather doctor` prints."""

    rows: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(name) for name in self.rows)
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu_row() -> str:
    if not has_gpu():
        return "none"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip is not None else f"CUDA {torch.version.cuda}"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    extra = f", and {torch.cuda.device_count() - 1} more" if torch.cuda.device_count() > 1 else ""
    return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, {kind}{extra}"


def doctor() -> Report:
    """Look at this machine and say what runs on it and how; launches no kernel.

    Returns:
        A `Report` whose rows are: python, torch, triton, GPU, Triton kernels, FP8 decode, notebooks.
    """
    notes = []
    if not triton_available():
        kernels = f"not here: {_import_error or 'triton is not installed'}"
        notes.append("the chapters that run Triton kernels (04 to 08) need Linux or Windows; the others work")
    elif interpreting():
        kernels = "in Triton's interpreter, on the CPU"
    elif has_gpu():
        kernels = "compiled, on the GPU"
    else:
        cause, remedy = _why_not_interpreted()
        kernels = f"not here: {cause}"
        notes.append(remedy)
    names = {dtype: str(dtype).removeprefix("torch.float8_") for dtype in FP8_DTYPES}
    decode = ", ".join(f"{names[dtype]}: {how}" for dtype, how in fp8_support().items())
    lab = _version("jupyterlab")
    rows = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "GPU": _gpu_row(),
        "Triton kernels": kernels,
        "FP8 decode": decode,
        "notebooks": f"JupyterLab {lab}" if lab != "not installed" else "JupyterLab is not installed",
    }
    return Report(rows, tuple(notes))
