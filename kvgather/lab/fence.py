"""Tensors that end, or begin, at memory that faults: an access one element outside the tensor ends the program.

A general tool. It applies to any argument of any Triton kernel, on a CPU under the interpreter or on a GPU:

    from kvgather.lab.fence import fenced

    scale = fenced(torch.tensor([0.5]), "cuda")  # the 64 MiB after the scale's four bytes are not mapped
    my_kernel[grid](x, scale, out)  # a read of scale[1] always gives "an illegal memory access was encountered"

An ordinary allocation hides such a read: allocators round sizes up to pages, segments and arenas, all of which are
mapped, and the kernel reads bytes of another allocation. A fault ends the process (CPU) or its CUDA context (GPU), so
run fenced kernels in a child process. A runnable example, with a kernel that reads one element before its tensor
(`kvgather.lab.planted`; the process ends with signal 11, and faulthandler prints the kernel's line):

    python -X faulthandler -m kvgather.lab.planted cu_seqlens_ptr before
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys

import torch
from torch import Tensor

from ..device import parse_device
from ..formats.checks import as_float, check_int, check_tensor, described, dtype_name, shown
from ._gpu_pages import GpuPages

SIDES = ("after", "before")
GUARD_BYTES = 2**26
"""Size of the guard, which takes address space but no memory. An access beyond the guard may reach other memory."""
MAX_GUARD_BYTES = 2**46
"""Half of a process's address space on x86-64 and on most ARM machines."""


class FenceError(ValueError):
    """This machine cannot build a fence, or an argument is wrong; the message gives the cause."""


def fenced(
    value: Tensor | float,
    device: torch.device | str = "cpu",
    side: str = "after",
    *,
    guard_bytes: int = GUARD_BYTES,
    keep_strides: bool = False,
) -> Tensor:
    """Copy a tensor to memory that faults right after its last byte, or right before its first byte.

    A kernel whose bug depends on strides needs `keep_strides`: the copy is contiguous otherwise, and an access that was
    outside the view may be inside the copy.

    Args:
        value: a tensor of any dtype, shape and strides; or a number, which becomes FP32 of shape `[1]`.
        device: "cpu" or a CUDA or ROCm device.
        side: "after" places the guard after the last byte, "before" places it before the first byte.
        guard_bytes: minimum size of the guard, rounded up to whole pages.
        keep_strides: whether the result has `value`'s strides, and a copy of the bytes between `value`'s elements.
            The guard is behind the last element, or before the first one; a fence has no guards in the gaps, whose
            accesses a strict trace reports (`kvgather.lab.trace`). False gives a contiguous tensor.

    Returns:
        A tensor with `value`'s dtype, shape and values. The tensor's memory and the guard are freed together with the
        tensor's last view. A tensor without elements has no address: its pointer is 0.

    Raises:
        FenceError: `side` or `guard_bytes` is wrong, or this machine cannot build a fence.
        TypeError, ValueError: `value` is neither a dense tensor with values nor a number that FP32 can represent,
            `device` is no device, or `keep_strides` is no bool. A side in the device's place, or a device in the
            side's, is named.

    Source: the guard pages of Electric Fence (Bruce Perens, 1987); on a GPU, the driver's virtual memory
        management (cuMemAddressReserve, cuMemMap).
    """
    _check_side(side, device)
    if not isinstance(keep_strides, bool):
        raise TypeError(f"keep_strides is {described(keep_strides)}; accepted: True, False")
    try:
        guard_bytes = check_int(guard_bytes, "guard_bytes", minimum=1, maximum=MAX_GUARD_BYTES)
    except ValueError as error:
        raise FenceError(str(error)) from None
    source = _source(value)
    where = parse_device(device)
    if where.type not in ("cpu", "cuda"):
        raise FenceError(f"device is {where}; accepted: a CPU, or a GPU that torch calls cuda")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise FenceError(f"device is {where}, and torch sees no GPU here; accepted: cpu")
    view = value if keep_strides and isinstance(value, Tensor) else source.contiguous()
    if view.numel() == 0:
        return torch.empty_strided(view.shape, view.stride(), dtype=source.dtype, device=where)
    with torch.no_grad():
        span = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        memory = view.as_strided((span,), (1,)).resolve_conj().resolve_neg()  # gaps included
        return _copied(memory, side, guard_bytes, where).as_strided(view.shape, view.stride())


def _copied(source: Tensor, side: str, guard_bytes: int, device: torch.device) -> Tensor:
    """A copy of a tensor `[n]` in guarded memory."""
    make = _cpu_bytes if device.type == "cpu" else functools.partial(_gpu_bytes, device=device)
    return make(source.numel() * source.element_size(), side, guard_bytes).view(source.dtype).copy_(source)


def _check_side(side: object, device: object) -> None:
    """Raise unless `side` is a side, and `device` is not one."""
    known = isinstance(side, str) and side in SIDES
    if isinstance(device, str) and device in SIDES:
        place = "" if known else f"device={shown(side)}, "
        raise FenceError(f"device is {device!r}, which is a side; write fenced(value, {place}side={device!r})")
    if known:
        return
    came = shown(side) if isinstance(side, str) else described(side)
    if isinstance(side, torch.device) or (isinstance(side, str) and side.split(":")[0] in ("cpu", "cuda")):
        raise FenceError(f"side is {came}, which is a device; write fenced(value, device={str(side)!r})")
    raise FenceError(f"side is {came}; accepted: 'after', 'before'")


def _source(value: object) -> Tensor:
    """The values to copy: a dense tensor, or a number as FP32 `[1]`, which may be NaN or infinite."""
    if isinstance(value, Tensor):
        if value.is_quantized:
            raise TypeError(f"value has dtype {dtype_name(value.dtype)}; accepted: a tensor that is not quantized")
        if value.layout == torch.strided and not value.is_nested:
            value = value.resolve_conj().resolve_neg()
        return check_tensor(value, "value")
    number = as_float(value)
    if number is None:
        raise TypeError(f"value is {described(value)}; accepted: a tensor or a number")
    held = torch.tensor([number], dtype=torch.float32, device="cpu")
    if bool(held.isinf()) and value != held.item():
        raise ValueError(f"value is {shown(value)}; accepted: numbers that FP32 can hold")
    return held


def round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def _cpu_bytes(nbytes: int, side: str, guard_bytes: int) -> Tensor:
    """`nbytes` of uint8 in a new anonymous mapping whose guard is PROT_NONE."""
    if sys.platform == "win32":
        raise FenceError("a fence on a CPU needs mprotect, which Windows does not have; accepted: Linux, macOS")
    body, guard = round_up(nbytes, mmap.PAGESIZE), round_up(guard_bytes, mmap.PAGESIZE)
    try:
        pages = mmap.mmap(-1, body + guard, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise FenceError(f"guard_bytes is {guard_bytes}, and no memory was mapped: {error.strerror}") from error
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    guard_address, data_offset = (base + body, body - nbytes) if side == "after" else (base, guard)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(guard_address), ctypes.c_size_t(guard), 0) != 0:
        raise FenceError(f"mprotect of {guard} bytes failed: {os.strerror(ctypes.get_errno())}")
    # The tensor's storage references `pages`, so the mapping is freed together with the last view.
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=data_offset)


def _gpu_bytes(nbytes: int, side: str, guard_bytes: int, device: torch.device) -> Tensor:
    """`nbytes` of uint8 in a new mapping, with reserved and unmapped addresses on both sides."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        pages = GpuPages(nbytes, guard_bytes, index)
    except (ImportError, RuntimeError) as error:
        raise FenceError(f"a fence on {device} cannot be built: {error}") from error
    return torch.as_tensor(pages.window(nbytes, side), device=torch.device("cuda", index))
