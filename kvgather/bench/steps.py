"""`kvgather bench steps`: the kernels of chapter 07, each one change from the one before, and the limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from .cases import Built, Case, build
from .gather import GPU_BASE, _empty, _limits, moved_bytes
from .implementations import Implementation, Outputs, ours, token_per_program
from .report import Row
from .runner import Call, Timing, cache_bytes, machine, run_cases, time_calls

BASELINE = "0 token per program"


def cases(device: torch.device) -> tuple[Case, ...]:
    """SHUFFLE and NHD, one scale for K and one for V.

    Raises:
        ValueError: the device is a CPU, where an interpreter's times say nothing.
    """
    if device.type != "cuda":
        raise ValueError(
            f"--device is {device.type}; accepted with steps: cuda, for an interpreter's times say nothing"
        )
    return tuple(replace(GPU_BASE, layout=layout) for layout in ("SHUFFLE", "NHD"))


def implementations() -> dict[str, Implementation]:
    """By name and in order: token per program, the four steps, this package's gather."""
    from ..lab.steps import STEPS, Step, gather

    def prepared(step: Step, built: Built, out: Outputs) -> Call:
        return lambda: gather(step, built.cache, built.plan, out)

    found: dict[str, Implementation] = {BASELINE: token_per_program}
    found |= {step.name: partial(prepared, step) for step in STEPS}
    return found | {"5 kvgather": ours}


def measure(case: Case, device: torch.device, *, seconds: float = 0.2) -> list[Row]:
    """Check every step against the reference on a case, then time it.

    Args:
        case: what to gather.
        device: where.
        seconds: about how long to measure each step.

    Raises:
        ArithmeticError: a step's rows are not the reference's.
    """
    moved = moved_bytes(case)
    copies = 1 if device.type == "cpu" else min(8, -(-3 * cache_bytes(device) // moved))
    builts = [build(case, device, seed, values="normal") for seed in range(copies)]
    outs = [(_empty(case, case.k_dim, device), _empty(case, case.v_dim, device)) for _ in builts]
    reference = builts[0].cache.gather(builts[0].plan, backend="torch")
    timings: dict[str, Timing] = {}
    for name, prepare in implementations().items():
        calls = [prepare(built, out) for built, out in zip(builts, outs, strict=True)]
        for tensor in outs[0]:
            tensor.fill_(float("nan"))
        calls[0]()
        for got, expected in zip(outs[0], reference, strict=True):
            if not torch.equal(got, expected):
                raise ArithmeticError(f"{name} is not the reference on {case.name}")
        timings[name] = time_calls(calls, device, seconds=seconds)
    limits, limit_bytes = _limits(case, device, seconds)
    cast = limit_bytes / limits["contiguous cast"].p50

    def row(name: str, timing: Timing) -> Row:
        size = limit_bytes if name in limits else moved
        return Row(
            benchmark="steps", case=case.name, implementation=name,
            p20_us=round(timing.p20, 2), p50_us=round(timing.p50, 2), p80_us=round(timing.p80, 2),
            samples=timing.samples, bytes=size, gb_per_s=round(size / timing.p50 / 1e3, 1),
            share_of_cast=round(size / timing.p50 / cast, 4), against_loop=0.0,
            against_token=round(timings[BASELINE].p50 / timing.p50, 2), **machine(device.type),
        )  # fmt: skip

    return [row(name, timing) for name, timing in (timings | limits).items()]


def run(
    device: torch.device,
    *,
    only: str = "",
    seconds: float = 0.2,
    progress: Callable[[str], None] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure every case whose name holds `only`; arguments as in `bench.gather.run`.

    Raises:
        ValueError: no case's name holds `only`.
    """
    return run_cases(
        cases(device), partial(measure, device=device, seconds=seconds), only=only, progress=progress, keep=keep
    )
