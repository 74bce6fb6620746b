"""`kvgather bench gather`: our gather, upstream's form of it, plain torch implementations, and the memory's limits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..cases import Case, build
from ..cases.measured import CALLS, LONGER, RAGGED, cases
from ..formats.fp8 import dequantize
from .calls import IMPLEMENTATIONS, MOST_COPIES, baseline_of, summary, time_calls_of_engines
from .implementations import Implementation, ours, plan_build, python_loop, token_per_program, torch_index
from .report import Row
from .runner import Call, Timing, check_rows, copies_for, row_of, run_cases, time_calls

__all__ = ["Inputs", "cases", "limits", "measure", "moved_bytes", "run", "summary"]

ONE_LAUNCH = 2048
"""Up to this many tokens each launch is timed by itself: the start and the end of a launch are most of its time."""


class Inputs:
    """Copies of a case's tensors that exceed the GPU's last cache together, and the rows that each gather fills.

    Args:
        case: what to gather.
        device: where.
        most: upper limit for the number of copies.
    """

    def __init__(self, case: Case, device: torch.device, most: int = 8) -> None:
        self.case = case
        copies = copies_for(moved_bytes(case), device, most)
        self.builts = [build(case, device, seed, values="normal") for seed in range(copies)]
        self.outs = [empty_rows(case, device) for _ in range(copies)]
        first = self.builts[0]
        self._reference = first.cache.gather(first.plan, out_dtype=case.out_dtype, backend="torch")

    def calls(self, prepare: Implementation) -> list[Call]:
        """The calls of an implementation, one for each copy."""
        return [prepare(built, out) for built, out in zip(self.builts, self.outs, strict=True)]

    def checked_calls(self, name: str, prepare: Implementation) -> list[Call]:
        """The calls of a gather, the first of which is compared with the reference.

        Raises:
            ArithmeticError: the gathered rows differ from the reference's.
        """
        calls = self.calls(prepare)
        check_rows(name, self.case.name, calls[0], self.outs[0], self._reference)
        return calls


def empty_rows(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialized rows for K and V, `[tokens, heads, dim]`."""
    k, v = (
        torch.empty(case.total_tokens, case.num_heads, dim, dtype=case.out_dtype, device=device)
        for dim in (case.k_dim, case.v_dim)
    )
    return k, v


def moved_bytes(case: Case) -> int:
    """Bytes a gather has to move: codes and scales read once, rows written once."""
    rows = case.total_tokens * case.num_heads
    codes = rows * (case.k_dim + case.v_dim)
    scales = sum(4 * rows for kind in (case.k_kind, case.v_kind) if kind == "per-token-head")
    return codes * (case.dtype.itemsize + case.out_dtype.itemsize) + scales


def measure(case: Case, device: torch.device, *, seconds: float = 0.2) -> list[Row]:
    """Compare every implementation with the reference on a case, then time it.

    Args:
        case: what to gather.
        device: where.
        seconds: approximate time to measure each implementation.

    Returns:
        A row for each implementation and each limit.

    Raises:
        ArithmeticError: an implementation's rows are not the reference's.
    """
    alone, most = is_timed_alone(case, device), MOST_COPIES if case in CALLS else 8
    inputs = Inputs(case, device, most)
    calls = {name: inputs.checked_calls(name, prepare) for name, prepare in _implementations(case, device).items()}
    if case in CALLS:
        timings = time_calls_of_engines(calls, device, seconds=seconds)
    else:
        timings = _time_each(calls, device, seconds, alone)
    overheads = {
        name: time_calls(inputs.calls(prepare), device, seconds=seconds, alone=alone)
        for name, prepare in _overheads(case, device).items()
    }
    limit_timings, limit_bytes = limits(case, device, seconds, alone=alone, most=most)
    cast = limit_bytes / limit_timings["contiguous cast"].p50
    row = partial(row_of, "gather", case.name + "-one_launch" * alone, device=device)

    def against(timing: Timing, *names: str) -> float:
        return next((timings[name].p50 / timing.p50 for name in names if name in timings), 0.0)

    def gather_row(name: str, timing: Timing, size: int) -> Row:
        return row(
            name, timing, size=size, share_of_cast=size / timing.p50 / cast,
            against_loop=against(timing, "python loop"),
            against_token=against(timing, "token per program", baseline_of(name)),
        )  # fmt: skip

    return [
        *(gather_row(name, timing, moved_bytes(case)) for name, timing in timings.items()),
        *(gather_row(name, timing, 0) for name, timing in overheads.items()),
        *(gather_row(name, timing, limit_bytes) for name, timing in limit_timings.items()),
    ]


def _time_each(calls: dict[str, list[Call]], device: torch.device, seconds: float, alone: bool) -> dict[str, Timing]:
    """GPU times, one implementation after the other; the Python loop synchronizes: by the clock, on one input."""
    timings = {}
    for name, copies in calls.items():
        loop = name == "python loop"
        timings[name] = time_calls(copies[:1] if loop else copies, device, seconds=seconds, graph=not loop, alone=alone)
    return timings


def is_timed_alone(case: Case, device: torch.device) -> bool:
    """Whether each launch is a CUDA graph of its own, instead of one of many in a graph."""
    return device.type == "cuda" and case.total_tokens <= ONE_LAUNCH and case not in CALLS


def _implementations(case: Case, device: torch.device) -> dict[str, Implementation]:
    chosen: dict[str, Implementation] = {"kvgather": ours}
    if case in CALLS:
        return dict(IMPLEMENTATIONS)
    plain = case.dtype == torch.float8_e4m3fn and case.k_kind in ("per-tensor", "per-token-head")
    if device.type == "cuda" and plain and case.page_size == 16 and case.lengths in (RAGGED, LONGER):
        from .launches import software_decode, trusting

        chosen |= {"trusts the table": trusting, "software decode": software_decode}
    if device.type == "cuda" and plain and case.layout != "HND":
        chosen["token per program"] = token_per_program
    if device.type == "cpu" or (plain and case.page_size == 16 and case.lengths == RAGGED):
        chosen["torch index"] = torch_index
        chosen["python loop"] = python_loop
    return chosen


def _overheads(case: Case, device: torch.device) -> dict[str, Implementation]:
    """Launches that gather nothing: the plan's build, and an empty kernel, which no gather can be faster than."""
    chosen: dict[str, Implementation] = {}
    if is_timed_alone(case, device):
        from .launches import empty_launch

        chosen["empty launch"] = empty_launch
    if device.type == "cuda" and case.lengths == LONGER:
        chosen["plan build"] = plan_build
    return chosen


def limits(
    case: Case, device: torch.device, seconds: float, *, alone: bool = False, most: int = 8
) -> tuple[dict[str, Timing], int]:
    """Time a contiguous cast with a scale and a contiguous copy over as many codes as the case has.

    Args:
        case: what to gather.
        device: where.
        seconds: approximate time to measure each limit.
        alone: as in `time_calls`.
        most: upper limit for the number of inputs.

    Returns:
        The timings by name, and the bytes that each limit moves.
    """
    n = case.total_tokens * case.num_heads * (case.k_dim + case.v_dim)
    size = n * (case.dtype.itemsize + case.out_dtype.itemsize)
    copies = copies_for(size, device, most)
    scale = torch.full((1,), 0.5, device=device)
    codes = [torch.randn(n, device=device).mul_(16).clamp_(-200, 200).to(case.dtype) for _ in range(copies)]
    rows = [torch.empty(n, dtype=case.out_dtype, device=device) for _ in range(copies)]
    halves = [torch.empty(size // 2, dtype=torch.uint8, device=device) for _ in range(2 * copies)]
    for half in halves:
        half.random_(0, 256)
    pairs = zip(halves[::2], halves[1::2], strict=True)
    copy_calls = [partial(target.copy_, source) for target, source in pairs]
    copy = time_calls(copy_calls, device, seconds=seconds, alone=alone)
    del halves, copy_calls
    if device.type == "cpu":
        casts = [time_calls([partial(dequantize, codes[0], scale, case.out_dtype)], device, seconds=seconds)]
    else:
        from .limits import CAST_TILES, cast

        casts = [
            time_calls(
                [partial(cast, codes[i], scale, rows[i], tile) for i in range(copies)],
                device,
                seconds=seconds / 2,
                alone=alone,
            )
            for tile in CAST_TILES
        ]
    return {"contiguous cast": min(casts, key=lambda t: t.p50), "contiguous copy": copy}, size


run = partial(run_cases, cases, measure)
"""`kvgather bench gather`; the arguments are those of `run_cases` from `device` on."""
