"""Launches of kernels that get a pointer to e4m3fn codes, on GPUs for which Triton does not compile such kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from kvgather.device import fp8_support, interpreting, parse_device
from kvgather.lab.trace import trace

__all__ = ["interpreted_if_refused"]


@contextmanager
def interpreted_if_refused(device: torch.device | str) -> Iterator[None]:
    """Context manager that runs kernels in the interpreter if Triton refuses pointers to e4m3fn for a device.

    Triton refuses them for NVIDIA GPUs before compute capability 8.9. On any other device the body runs as it is.

    Args:
        device: the device of the launch's tensors.
    """
    parsed = parse_device(device)
    compiled_for_nvidia = parsed.type == "cuda" and torch.version.hip is None and not interpreting()
    refused = compiled_for_nvidia and fp8_support(parsed)[torch.float8_e4m3fn] == "software"
    with trace() if refused else nullcontext():
        yield
