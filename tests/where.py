"""Where a test's kernels run: in Triton's interpreter on a CPU, compiled on a GPU, each where there is one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from kvgather.device import interpreting

interpreted = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter, and kernels are compiled here; the GPU's twin runs"
)
CPU = pytest.param("cpu", marks=[pytest.mark.triton, interpreted])
GPU = pytest.param("cuda", marks=[pytest.mark.triton, pytest.mark.gpu])

on_each_device = pytest.mark.parametrize("where", [CPU, GPU])
"""The test takes `where`, and runs for "cpu" and for "cuda"."""


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """A block in which an operation that waits for the GPU raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # it is a prototype, and says so
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
