"""`kvgather bench gather`: our gather, upstream's form of it, what one would write in plain torch, and the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..formats.fp8 import dequantize
from ..formats.layout import LAYOUTS
from .calls import CALLS, IMPLEMENTATIONS, MOST_COPIES, baseline_of, summary, time_calls_of_engines
from .cases import Case, build
from .implementations import Implementation, ours, plan_build, python_loop, token_per_program, torch_index
from .report import Row
from .runner import Call, Timing, cache_bytes, machine, run_cases, time_calls

__all__ = ["cases", "measure", "run", "summary"]

RAGGED = tuple(8192 + 113 * (5 * i % 16) - 847 for i in range(16))
"""16 sequences around 8,192 tokens, one for each remainder by 16."""
LONGER = tuple(length + 870 for length in RAGGED)
"""145,000 tokens, of which a plan is built."""
ONE_LAUNCH = 2048
"""Up to so many tokens a launch is timed alone: what it costs to begin and to end is then most of it."""
GPU_BASE = Case(num_heads=8, k_dim=64, v_dim=64, lengths=RAGGED, starts=())
CPU_BASE = replace(GPU_BASE, lengths=(4096,) * 8)


def _gpu_cases() -> Iterator[Case]:
    for dim in (64, 128):
        for page in (16, 32, 64, 128):
            for layout in LAYOUTS:
                for kind in ("per-tensor", "per-head", "per-token-head"):
                    yield replace(
                        GPU_BASE, layout=layout, page_size=page, k_dim=dim, v_dim=dim, k_kind=kind, v_kind=kind
                    )
    for layout in LAYOUTS:
        yield replace(GPU_BASE, layout=layout, num_heads=1)
        yield replace(GPU_BASE, layout=layout, k_dim=192, v_dim=128)
        yield replace(GPU_BASE, layout=layout, lengths=(262144,))
        yield replace(GPU_BASE, layout=layout, lengths=(512,) * 256)
        yield replace(GPU_BASE, layout=layout, dtype=torch.bfloat16, k_kind="none", v_kind="none")
        yield replace(GPU_BASE, layout=layout, dtype=torch.float8_e5m2)
        yield replace(GPU_BASE, layout=layout, dtype=torch.float8_e4m3fnuz)  # in software on NVIDIA
        yield replace(GPU_BASE, layout=layout, lengths=(1500,))
        yield replace(GPU_BASE, layout=layout, lengths=LONGER)
    yield from CALLS


def _cpu_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        for kind in ("per-tensor", "per-token-head"):
            yield replace(CPU_BASE, layout=layout, k_kind=kind, v_kind=kind)


def cases(device: torch.device) -> tuple[Case, ...]:
    """The cases that are measured on a device."""
    return tuple(_gpu_cases() if device.type == "cuda" else _cpu_cases())


def moved_bytes(case: Case) -> int:
    """Bytes a gather has to move: codes and scales read once, rows written once."""
    rows = case.total_tokens * case.num_heads
    codes = rows * (case.k_dim + case.v_dim)
    scales = sum(4 * rows for kind in (case.k_kind, case.v_kind) if kind == "per-token-head")
    return codes * (case.dtype.itemsize + case.out_dtype.itemsize) + scales


def measure(case: Case, device: torch.device, *, seconds: float = 0.2) -> list[Row]:
    """Check every implementation against the reference on a case, then time it.

    Args:
        case: what to gather.
        device: where.
        seconds: about how long to measure each implementation.

    Returns:
        A row per implementation, the limits among them.

    Raises:
        ArithmeticError: an implementation's rows are not the reference's.
    """
    moved, alone = moved_bytes(case), is_timed_alone(case, device)
    builts = [build(case, device, seed, values="normal") for seed in range(_copies(case, moved, device))]
    outs = [(_empty(case, case.k_dim, device), _empty(case, case.v_dim, device)) for _ in builts]
    reference = builts[0].cache.gather(builts[0].plan, out_dtype=case.out_dtype, backend="torch")
    ways: dict[str, list[Call]] = {}
    for name, prepare in _implementations(case, device).items():
        ways[name] = [prepare(built, out) for built, out in zip(builts, outs, strict=True)]
        for tensor in outs[0]:
            tensor.fill_(float("nan"))
        ways[name][0]()
        for got, expected in zip(outs[0], reference, strict=True):
            if not torch.equal(got, expected):
                raise ArithmeticError(f"{name} is not the reference on {case.name}")
    if case in CALLS:
        timings = time_calls_of_engines(ways, device, seconds=seconds)
    else:
        timings = _time_each(ways, device, seconds, alone)
    no_gathers = {
        name: time_calls([prepare(*pair) for pair in zip(builts, outs, strict=True)], device, seconds=seconds,
                         alone=alone)
        for name, prepare in _no_gathers(case, device).items()
    }  # fmt: skip
    limits, limit_bytes = _limits(case, device, seconds)
    cast = limit_bytes / limits["contiguous cast"].p50

    def against(timing: Timing, *names: str) -> float:
        return next((round(timings[name].p50 / timing.p50, 2) for name in names if name in timings), 0.0)

    def row(name: str, timing: Timing, size: int) -> Row:
        return Row(
            benchmark="gather", case=case.name + "-one_launch" * alone, implementation=name,
            p20_us=round(timing.p20, 2), p50_us=round(timing.p50, 2), p80_us=round(timing.p80, 2),
            samples=timing.samples, bytes=size, gb_per_s=round(size / timing.p50 / 1e3, 1),
            share_of_cast=round(size / timing.p50 / cast, 4), against_loop=against(timing, "python loop"),
            against_token=against(timing, "token per program", baseline_of(name)),
            **machine(device.type),
        )  # fmt: skip

    return [
        *(row(name, timing, moved) for name, timing in timings.items()),
        *(row(name, timing, 0) for name, timing in no_gathers.items()),
        *(row(name, timing, limit_bytes) for name, timing in limits.items()),
    ]


def _time_each(ways: dict[str, list[Call]], device: torch.device, seconds: float, alone: bool) -> dict[str, Timing]:
    """GPU time, one implementation after the other; the Python loop, which waits, by the clock and on one input."""
    timings = {}
    for name, calls in ways.items():
        loop = name == "python loop"
        timings[name] = time_calls(calls[:1] if loop else calls, device, seconds=seconds, graph=not loop, alone=alone)
    return timings


def _copies(case: Case, moved: int, device: torch.device) -> int:
    """Inputs to take in turns: as many as leave the GPU's last cache."""
    most = MOST_COPIES if case in CALLS else 8
    return 1 if device.type == "cpu" else min(most, -(-3 * cache_bytes(device) // moved))


def is_timed_alone(case: Case, device: torch.device) -> bool:
    """Whether each launch is a CUDA graph of its own, instead of one of several in a row."""
    return device.type == "cuda" and case.total_tokens <= ONE_LAUNCH and case not in CALLS


def _implementations(case: Case, device: torch.device) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {"kvgather": ours}
    if case in CALLS:
        return dict(IMPLEMENTATIONS)
    plain = case.dtype == torch.float8_e4m3fn and case.k_kind in ("per-tensor", "per-token-head")
    if device.type == "cuda" and plain and case.page_size == 16 and case.lengths in (RAGGED, LONGER):
        from .launches import software_decode, trusting

        found |= {"trusts the table": trusting, "software decode": software_decode}
    if device.type == "cuda" and plain and case.layout != "HND":
        found["token per program"] = token_per_program
    if device.type == "cpu" or (plain and case.page_size == 16 and case.lengths == RAGGED):
        found["torch index"] = torch_index
        found["python loop"] = python_loop
    return found


def _no_gathers(case: Case, device: torch.device) -> dict[str, Implementation]:
    """What a gather needs besides, and what it cannot be faster than."""
    found: dict[str, Implementation] = {}
    if is_timed_alone(case, device):
        from .launches import empty_launch

        found["empty launch"] = empty_launch
    if device.type == "cuda" and case.lengths == LONGER:
        found["plan build"] = plan_build
    return found


def _empty(case: Case, dim: int, device: torch.device) -> Tensor:
    return torch.empty(case.total_tokens, case.num_heads, dim, dtype=case.out_dtype, device=device)


def _limits(case: Case, device: torch.device, seconds: float) -> tuple[dict[str, Timing], int]:
    """A contiguous cast with a scale, and a contiguous copy, of as many codes as the case has, and their bytes."""
    n, alone = case.total_tokens * case.num_heads * (case.k_dim + case.v_dim), is_timed_alone(case, device)
    moved = n * (case.dtype.itemsize + case.out_dtype.itemsize)
    copies = _copies(case, moved, device)
    scale = torch.full((1,), 0.5, device=device)
    held = [torch.randn(n, device=device).mul_(16).clamp_(-200, 200).to(case.dtype) for _ in range(copies)]
    out = [torch.empty(n, dtype=case.out_dtype, device=device) for _ in range(copies)]
    halves = [torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(2 * copies)]
    for half in halves:
        half.random_(0, 256)
    pairs = zip(halves[::2], halves[1::2], strict=True)
    copies_of_bytes = [partial(target.copy_, source) for target, source in pairs]
    copy = time_calls(copies_of_bytes, device, seconds=seconds, alone=alone)
    del halves, copies_of_bytes
    if device.type == "cpu":
        plain = partial(dequantize, held[0], scale, case.out_dtype)
        casts = [time_calls([plain], device, seconds=seconds)]
    else:
        from .limits import CAST_TILES, cast

        casts = [
            time_calls(
                [partial(cast, codes, scale, rows, tile) for codes, rows in zip(held, out, strict=True)],
                device,
                seconds=seconds / 2,
                alone=alone,
            )
            for tile in CAST_TILES
        ]
    return {"contiguous cast": min(casts, key=lambda t: t.p50), "contiguous copy": copy}, moved


def run(
    device: torch.device,
    *,
    only: str = "",
    seconds: float = 0.2,
    progress: Callable[[str], None] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure every case whose name holds `only`.

    Args:
        device: where.
        only: part of a case's name; empty is all.
        seconds: about how long to measure each implementation.
        progress: called with a line before each case.
        keep: called with each case's rows when they were measured.

    Raises:
        ValueError: no case's name holds `only`.
    """
    return run_cases(
        cases(device), partial(measure, device=device, seconds=seconds), only=only, progress=progress, keep=keep
    )
