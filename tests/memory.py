"""Much memory for tests of large offsets: real on a GPU, on a CPU only reserved, so that what is touched exists."""

from __future__ import annotations

import mmap
import sys
import time

import pytest
import torch
from torch import Tensor

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python has the name from 3.13 on


def memory(elements: int, dtype: torch.dtype, where: str) -> Tensor:
    """Uninitialised memory: real on a GPU, reserved on a CPU."""
    size = elements * dtype.itemsize
    if where == "cuda":
        torch.cuda.empty_cache()  # what an earlier test of this process has freed counts as free
        wait_for_gpu_memory(2 * size + 2**30)
        return torch.empty(elements, dtype=dtype, device=where)
    if sys.platform != "linux":
        pytest.skip("needs Linux, which reserves memory without giving it")
    try:
        reserved = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"{size / 2**30:.1f} GiB of addresses cannot be reserved here: {error}")
    return torch.frombuffer(reserved, dtype=torch.uint8).view(dtype)


def wait_for_gpu_memory(size: int, seconds: float = 120.0) -> None:
    """Until so many bytes are free: other processes share the GPU, and what they hold now says nothing about it."""
    total = torch.cuda.get_device_properties("cuda").total_memory
    if total < size:
        pytest.skip(f"needs {size / 2**30:.1f} GiB of GPU memory, and the GPU has {total / 2**30:.1f}")
    end = time.monotonic() + seconds
    while (free := torch.cuda.mem_get_info()[0]) < size and time.monotonic() < end:
        time.sleep(1)
    assert free >= size, f"{free / 2**30:.1f} GiB of the GPU were free for {seconds:g} s, of {size / 2**30:.1f} needed"
