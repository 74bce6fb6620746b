"""What a CUDA graph's capture may make: nothing that a later eager call would find in a batch.

Work that is captured runs when the graph is replayed. A record made then is uninitialised memory until the first
replay, and that of another step after each further one.
"""

from __future__ import annotations

import torch


class CaptureError(ValueError):
    """A batch lacks what a layer needs of it while a CUDA graph is captured, or was itself built in a capture."""


def capturing(device: torch.device) -> bool:
    """Whether what is launched now on `device` is captured in a CUDA graph, to run when that is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_may_make(device: torch.device, built_in_capture: bool, what: str) -> None:
    """Raise if a batch may not make `what` now and keep it.

    Args:
        built_in_capture: whether the batch was: then it lives in that graph, and so does what its layers need.

    Raises:
        CaptureError: it would be made where the batch does not live.
    """
    now = capturing(device)
    if now == built_in_capture:
        return
    if now:
        raise CaptureError(
            f"{what} is first needed while a CUDA graph is captured, and would hold nothing before a replay; accepted: "
            "a batch that has it: call PrefixBatch.prepare(...) for the layer, or pass its window in windows= of "
            "PrefixBatch.build, before the capture"
        )
    raise CaptureError(
        f"{what} is needed of a batch that was built while a CUDA graph was captured, and holds nothing but in that "
        "graph's replays; accepted: the same capture, or a batch that was built outside of one"
    )
