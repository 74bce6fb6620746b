"""Devices as arguments, FP8 support of GPUs, and `doctor`, which reports what a machine can run.

The import of this module on a machine without a GPU enables Triton's interpreter; see `kvgather.interpreter`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from dataclasses import dataclass, field

import torch

from .interpreter import (
    BackendError,
    has_gpu,
    interpreted_meanwhile,
    interpreting,
    require_triton,
    triton_available,
    why_no_triton,
    why_not_interpreting,
)

__all__ = [
    "FP8_DTYPES",
    "BackendError",
    "Report",
    "doctor",
    "fp8_in_hardware",
    "fp8_support",
    "has_gpu",
    "interpreted_meanwhile",
    "interpreting",
    "parse_device",
    "require_triton",
    "resolve_device",
    "triton_available",
]

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


def parse_device(device: object, name: str = "device") -> torch.device:
    """Convert an argument to a `torch.device`, without a check that this machine has the device.

    Raises:
        TypeError, ValueError: `device` is neither a device nor the name of one; the message begins with `name`.
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
    """Convert an argument to a `torch.device` on which this machine can allocate tensors.

    Args:
        device: a device or its name; None is the GPU if the machine has one, else the CPU.
        name: the argument's name, for errors.

    Raises:
        TypeError, ValueError: `device` is no device, a device that this machine does not have, or "meta", which holds
            no values.
    """
    if device is None:
        return torch.device("cuda" if has_gpu() else "cpu")
    parsed = parse_device(device, name)
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if has_gpu() else 0
        if (parsed.index or 0) >= count:
            raise ValueError(f"{name} is {parsed}, and torch sees {count} GPUs here; accepted: one of those, or cpu")
    elif parsed.type == "meta":
        raise ValueError(f"{name} is meta, which holds no values; accepted: a GPU, or cpu")
    elif parsed.type != "cpu":
        try:
            torch.empty(0, device=parsed)
        except Exception as error:  # each backend raises its own type of error
            lines = str(error).splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"{name} is {parsed}, which torch cannot use here ({lines[0]:.100})") from None
    return parsed


def fp8_support(device: torch.device | str | None = None) -> dict[torch.dtype, str]:
    """How kernels decode FP8 codes on a device: with hardware conversions, or in software with integer arithmetic.

    Args:
        device: a torch device; None is the GPU if the machine has one, else the CPU.

    Returns:
        "hardware" or "software" for each FP8 dtype. The software decoder is exact for all 256 codes. Kernels in
        Triton's interpreter always use it, because the interpreter converts NaN codes incorrectly.

    Raises:
        TypeError, ValueError: `device` is no device, or a GPU that torch does not see.

    Source: NVIDIA GPUs have e4m3 and e5m2 from compute capability 8.9; AMD's gfx942 has the fnuz formats, gfx950 and
        RDNA4 the OCP formats.
    """
    parsed = resolve_device(None) if device is None else parse_device(device)
    in_hardware: frozenset[torch.dtype] = frozenset()
    if parsed.type == "cuda" and not interpreting():
        in_hardware = fp8_in_hardware(*_architecture(parsed))
    return {dtype: "hardware" if dtype in in_hardware else "software" for dtype in FP8_DTYPES}


def _architecture(gpu: torch.device) -> tuple[str, str]:
    """The backend and the architecture of a GPU, the arguments of `fp8_in_hardware`."""
    try:
        if torch.version.hip is not None:
            return "hip", torch.cuda.get_device_properties(gpu).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(gpu)
    except (AssertionError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"device is {gpu}; accepted: a GPU that torch sees here, or cpu ({line:.100})") from None
    return "cuda", f"{major}{minor}"


def fp8_in_hardware(backend: str, arch: str) -> frozenset[torch.dtype]:
    """The FP8 dtypes that an architecture decodes in hardware.

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
    """What this machine can run; `str(report)` is the table that `kvgather doctor` prints."""

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
    """Report what this machine can run, without the launch of a kernel.

    Returns:
        A `Report` whose rows are: python, torch, triton, GPU, Triton kernels, FP8 decode, notebooks.
    """
    notes = []
    if not triton_available():
        kernels = f"not here: {why_no_triton()}"
        notes.append("the chapters that run Triton kernels (04 to 08) need Linux or Windows; the others work")
    elif interpreting():
        kernels = "in Triton's interpreter, on the CPU"
    elif has_gpu():
        kernels = "compiled, on the GPU"
    else:
        cause, remedy = why_not_interpreting()
        kernels = f"not here: {cause}"
        notes.append(remedy)
    names = {dtype: str(dtype).removeprefix("torch.float8_") for dtype in FP8_DTYPES}
    decode = ", ".join(f"{names[dtype]}: {decoder}" for dtype, decoder in fp8_support().items())
    jupyterlab = _version("jupyterlab")
    rows = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "GPU": _gpu_row(),
        "Triton kernels": kernels,
        "FP8 decode": decode,
        "notebooks": f"JupyterLab {jupyterlab}" if jupyterlab != "not installed" else "JupyterLab is not installed",
    }
    return Report(rows, tuple(notes))
