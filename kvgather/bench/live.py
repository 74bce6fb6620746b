"""The gather on the reader's machine, for chapter 07: one case, its implementations and the memory's limit in turns."""

from __future__ import annotations

from functools import partial

import torch

from ..cases import Case
from .gather import Inputs, moved_bytes
from .implementations import Implementation, ours, token_per_program, torch_index
from .report import Row
from .runner import Call, row_of
from .turns import time_in_turns

__all__ = ["measure_in_turns"]

COPY = "contiguous copy"


def measure_in_turns(case: Case, device: torch.device, *, seconds: float = 0.3) -> list[Row]:
    """Compare our gather and plain torch with the reference on a case, then time them and a copy in turns.

    Whatever else the machine does slows all of them alike, so that their ratios hold.

    Args:
        case: what to gather.
        device: where; a GPU also runs one program per (token, head).
        seconds: approximate time to measure each of them.

    Returns:
        A row for each implementation, and one for a contiguous copy of as many bytes.

    Raises:
        ArithmeticError: an implementation's rows are not the reference's.
    """
    chosen: dict[str, Implementation] = {"kvgather": ours, "torch index": torch_index}
    if device.type == "cuda":
        chosen["token per program"] = token_per_program
    inputs, size = Inputs(case, device), moved_bytes(case)
    ways: dict[str, list[Call]] = {name: inputs.checked_calls(name, prepare) for name, prepare in chosen.items()}
    halves = [torch.zeros(2, size // 2, dtype=torch.uint8, device=device) for _ in inputs.builts]
    ways[COPY] = [partial(target.copy_, source) for target, source in halves]
    timings = time_in_turns(ways, device, seconds=seconds)
    return [row_of("live", case.name, name, timing, device, size=size) for name, timing in timings.items()]
