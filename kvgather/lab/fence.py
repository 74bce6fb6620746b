"""Tensors that end, or begin, at memory that faults: an access one element outside stops the program at once.

A general tool. Put it around any argument of any Triton kernel, on a CPU under the interpreter or on a GPU:

    from kvgather.lab.fence import fenced

    scale = fenced(torch.tensor([0.5]), "cuda")  # the next 64 MiB after its four bytes are not mapped
    my_kernel[grid](x, scale, out)  # reads scale[1]? "an illegal memory access was encountered", every time

An ordinary allocation hides such a read: it is rounded up to pages, segments and arenas that are all mapped,
so the kernel computes with whatever lies there. The price of a fence is that the process (CPU) or its CUDA
context (GPU) does not survive: run it in a child process. An example that runs, with a kernel that reads one
element before its tensor (`kvgather.lab.planted`, 20 lines; signal 11, and the kernel's line):

    python -X faulthandler -m kvgather.lab.planted cu_seqlens_ptr before
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys

import torch
from torch import Tensor

from ._gpu_pages import GpuPages

SIDES = ("after", "before")
GUARD_BYTES = 2**26
"""How far the guard reaches: address space, no memory. An access beyond it may land elsewhere."""


class FenceError(ValueError):
    """A fence cannot be built here, or its arguments are wrong; the message says which."""


def fenced(
    value: Tensor | float,
    device: torch.device | str = "cpu",
    side: str = "after",
    *,
    guard_bytes: int = GUARD_BYTES,
) -> Tensor:
    """Copy a tensor to where its last byte is followed, or its first byte preceded, by memory that faults.

    Args:
        value: a tensor of any dtype, shape and strides; or a number, which becomes FP32 of shape `[1]`.
        device: "cpu" or a CUDA or ROCm device.
        side: "after", the guard begins right after the last byte; "before", it ends right before the first.
        guard_bytes: how far the guard reaches, at least; rounded up to whole pages.

    Returns:
        A contiguous tensor with `value`'s dtype, shape and values. Its memory and the guard are freed when
        the last view of it dies. A tensor with no elements has no address at all: its pointer is 0.

    Raises:
        FenceError: `side` or `guard_bytes` is wrong, or this machine has no way to build a fence.

    Source: the guard pages of Electric Fence (Bruce Perens, 1987); on a GPU, the driver's virtual memory
        management (cuMemAddressReserve, cuMemMap).
    """
    if side not in SIDES:
        raise FenceError(f"side is {side!r}; accepted: 'after', 'before'")
    if guard_bytes <= 0:
        raise FenceError(f"guard_bytes is {guard_bytes}; accepted: 1 or more")
    source = value if isinstance(value, Tensor) else torch.tensor([value], dtype=torch.float32)
    where = torch.device(device)
    if source.numel() == 0:
        return torch.empty(source.shape, dtype=source.dtype, device=where)
    nbytes = source.numel() * source.element_size()
    if where.type == "cpu":
        raw = _cpu_bytes(nbytes, side, guard_bytes)
    elif where.type == "cuda":
        raw = _gpu_bytes(nbytes, side, guard_bytes, where)
    else:
        raise FenceError(f"device is {where}; accepted: a CPU, or a GPU that torch calls cuda")
    with torch.no_grad():
        return raw.view(source.dtype).view(source.shape).copy_(source)


def round_up(nbytes: int, unit: int) -> int:
    return math.ceil(nbytes / unit) * unit


def _cpu_bytes(nbytes: int, side: str, guard_bytes: int) -> Tensor:
    """`nbytes` of uint8 in an anonymous mapping of their own, one side of which is PROT_NONE."""
    if sys.platform == "win32":
        raise FenceError("a fence on a CPU needs mprotect, which Windows does not have; accepted: Linux, macOS")
    body, guard = round_up(nbytes, mmap.PAGESIZE), round_up(guard_bytes, mmap.PAGESIZE)
    pages = mmap.mmap(-1, body + guard, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    guard_at, data_at = (base + body, body - nbytes) if side == "after" else (base, guard)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(guard_at), ctypes.c_size_t(guard), 0) != 0:
        raise FenceError(f"mprotect of {guard} bytes failed: {os.strerror(ctypes.get_errno())}")
    # The tensor's storage holds `pages`: the mapping goes when the last view does.
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=data_at)


def _gpu_bytes(nbytes: int, side: str, guard_bytes: int, device: torch.device) -> Tensor:
    """`nbytes` of uint8 in a mapping of their own, with reserved and unmapped addresses on both sides."""
    if not torch.cuda.is_available():
        raise FenceError(f"device is {device}, and torch sees no GPU here; accepted: cpu")
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        pages = GpuPages(nbytes, guard_bytes, index)
    except (ImportError, RuntimeError) as error:
        raise FenceError(f"a fence on {device} cannot be built: {error}") from error
    return torch.as_tensor(pages.window(nbytes, side), device=torch.device("cuda", index))
