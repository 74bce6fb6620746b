"""The devices of tests: kernels run in Triton's interpreter on a CPU, or compiled on a GPU if the machine has one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from kvgather.device import interpreting

interpreted = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter, and kernels are compiled here; the test on the GPU runs"
)
CPU = pytest.param("cpu", marks=[pytest.mark.triton, interpreted])
GPU = pytest.param("cuda", marks=[pytest.mark.triton, pytest.mark.gpu])

on_each_device = pytest.mark.parametrize("where", [CPU, GPU])
"""Runs a test with its parameter `where` set to "cpu" and to "cuda"."""


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Context manager in which an operation that synchronizes with the GPU raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # torch warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
