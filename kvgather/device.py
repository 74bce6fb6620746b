"""Where kernels run: on a GPU, or in Triton's interpreter on a machine that has none.

Importing this module on a machine with no GPU sets TRITON_INTERPRET=1, unless the variable is already set or triton
is already imported: Triton reads it when a kernel is decorated, its own library's kernels included, so it has to be
there before triton is. Everything that imports triton in this package goes through here first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
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


def triton_available() -> bool:
    """Whether triton is installed (it is not on macOS)."""
    return _HAS_TRITON


def _interpret_by_default() -> None:
    if not has_gpu() and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


_interpret_by_default()


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


@functools.cache
def _library_interpreted() -> bool:
    """Whether Triton's own functions were decorated for the interpreter, which was when triton was imported."""
    if not _HAS_NUMPY:  # the interpreter is built on it
        return False
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    library: Any = tl.cdiv
    return isinstance(library, InterpretedFunction)


def require_triton(device: torch.device) -> None:
    """Raise unless Triton kernels can run on tensors of `device`.

    Args:
        device: where the tensors of the launch are.

    Raises:
        BackendError: triton is missing, was imported without its interpreter on a machine with no GPU, or the
            tensors are on a CPU while kernels are compiled for a GPU.
    """
    if not triton_available():
        raise BackendError('backend="triton" needs triton, which is not installed here; accepted: "torch" or "auto"')
    if device.type == "cuda" or interpreting():
        return
    if has_gpu():
        raise BackendError(
            f'backend="triton" got tensors on {device}, and kernels are compiled for the GPU here; accepted: tensors '
            'on the GPU, backend="torch", or TRITON_INTERPRET=1 set before Python starts'
        )
    raise BackendError(
        'backend="triton" needs Triton\'s interpreter on a machine with no GPU, and triton was imported before it '
        "was switched on; import kvgather before triton, or set TRITON_INTERPRET=1 before Python starts"
    )


def fp8_support(device: torch.device | str | None = None) -> dict[torch.dtype, str]:
    """How FP8 codes are decoded on a device: by the hardware, or in software from integers.

    Args:
        device: a torch device; None is the GPU if there is one, else the CPU.

    Returns:
        For each FP8 dtype "hardware" or "software". Software decode is exact for all 256 codes. It is always used
        under Triton's interpreter, whose own conversions get NaN codes wrong.

    Source: NVIDIA has e4m3 and e5m2 from compute capability 8.9; AMD gfx942 has the fnuz forms, gfx950 and RDNA4
        the OCP ones.
    """
    where = torch.device(device) if device is not None else torch.device("cuda" if has_gpu() else "cpu")
    decoded: frozenset[torch.dtype] = frozenset()
    if where.type == "cuda" and not interpreting():
        if torch.version.hip is not None:
            decoded = fp8_in_hardware("hip", torch.cuda.get_device_properties(where).gcnArchName.split(":")[0])
        else:
            major, minor = torch.cuda.get_device_capability(where)
            decoded = fp8_in_hardware("cuda", f"{major}{minor}")
    return {dtype: "hardware" if dtype in decoded else "software" for dtype in FP8_DTYPES}


def fp8_in_hardware(backend: str, arch: str) -> frozenset[torch.dtype]:
    """The FP8 dtypes that an architecture decodes itself.

    Args:
        backend: "cuda" or "hip".
        arch: a compute capability without its dot ("90", "120"), or a name such as "gfx942".
    """
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
        kernels = "not here: triton is not installed"
        notes.append("the chapters that run Triton kernels (04 to 07) need Linux or Windows; the others work")
    elif interpreting():
        kernels = "in Triton's interpreter, on the CPU"
    elif has_gpu():
        kernels = "compiled, on the GPU"
    else:
        kernels = "not here: triton was imported before its interpreter was switched on"
        notes.append("import kvgather before triton, or set TRITON_INTERPRET=1 before Python starts")
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
