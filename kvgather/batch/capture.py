"""CUDA graph capture: a capture must not create tensors that a batch keeps for later eager calls.

Captured work runs when the graph is replayed. A plan that is created during a capture is uninitialized memory until the
first replay, and each replay overwrites it.
"""

from __future__ import annotations

import torch


class CaptureError(ValueError):
    """A batch lacks a layer's plan while a CUDA graph is captured, or the batch was built in another capture."""


def capturing(device: torch.device) -> bool:
    """Whether launches on `device` are being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_may_create(device: torch.device, built_in_capture: bool, what: str) -> None:
    """Raise if a batch must not create and keep an object now.

    Args:
        device: the batch's device.
        built_in_capture: whether the batch was built during a capture; its objects then belong to that graph too.
        what: the object's name, for errors.

    Raises:
        CaptureError: a CUDA graph is being captured and the batch was built outside of a capture, or the reverse.
    """
    is_capturing = capturing(device)
    if is_capturing == built_in_capture:
        return
    if is_capturing:
        raise CaptureError(
            f"{what} is first needed while a CUDA graph is captured, and would be uninitialized until a replay; "
            "accepted: a batch that has it: call PrefixBatch.prepare(...) for the layer, or pass its window in "
            "windows= of PrefixBatch.build, before the capture"
        )
    raise CaptureError(
        f"{what} is needed from a batch that was built while a CUDA graph was captured, and is only valid in that "
        "graph's replays; accepted: the same capture, or a batch that was built outside of a capture"
    )
