"""`kvgather bench steps`: the kernels of chapter 07, each one change from the one before, and the limits."""

from __future__ import annotations

from functools import partial

import torch

from ..cases import Built, Case
from ..cases.measured import STEPS as CASES
from .gather import Inputs, limits, moved_bytes
from .implementations import Implementation, Outputs, ours, token_per_program
from .report import Row
from .runner import Call, row_of, run_cases, time_calls

BASELINE = "0 token per program"


def cases(device: torch.device) -> tuple[Case, ...]:
    """The cases that are measured on a device.

    Raises:
        ValueError: the device is a CPU, where the interpreter's times say nothing about a kernel.
    """
    if device.type != "cuda":
        raise ValueError(
            f"--device is {device.type}; accepted with steps: cuda, for an interpreter's times say nothing"
        )
    return CASES


def implementations() -> dict[str, Implementation]:
    """By name and in order: token per program, the four steps, this package's gather."""
    from ..lab.steps import STEPS, Step, gather

    def prepared(step: Step, built: Built, out: Outputs) -> Call:
        return lambda: gather(step, built.cache, built.plan, out)

    steps: dict[str, Implementation] = {step.name: partial(prepared, step) for step in STEPS}
    return {BASELINE: token_per_program} | steps | {"5 kvgather": ours}


def measure(case: Case, device: torch.device, *, seconds: float = 0.2) -> list[Row]:
    """Compare every step with the reference on a case, then time it.

    Args:
        case: what to gather.
        device: where.
        seconds: approximate time to measure each step.

    Raises:
        ArithmeticError: a step's rows are not the reference's.
    """
    inputs = Inputs(case, device)
    timings = {
        name: time_calls(inputs.checked_calls(name, prepare), device, seconds=seconds)
        for name, prepare in implementations().items()
    }
    limit_timings, limit_bytes = limits(case, device, seconds)
    cast, baseline = limit_bytes / limit_timings["contiguous cast"].p50, timings[BASELINE].p50
    sizes = dict.fromkeys(timings, moved_bytes(case)) | dict.fromkeys(limit_timings, limit_bytes)
    return [
        row_of(
            "steps", case.name, name, timing, device, size=sizes[name],
            share_of_cast=sizes[name] / timing.p50 / cast, against_token=baseline / timing.p50,
        )
        for name, timing in (timings | limit_timings).items()
    ]  # fmt: skip


run = partial(run_cases, cases, measure)
"""`kvgather bench steps`; the arguments are those of `run_cases` from `device` on."""
