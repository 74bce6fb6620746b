"""The measured times of the prefix path's three ways, next to the path that the rule behind `path="auto"` takes now.

Pictures, tables and checks of chapter 08b read the same rows and ask the same rule, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..attention.choose import SPEEDS, Facts, choose, expected_times
from ..batch.lengths import STEP
from ..bench import report
from ..bench.results import find_results
from ..cases.prefix import PrefixCase, cases

__all__ = [
    "FILE", "PATHS", "MeasuredPaths", "expected_of_case", "facts_of_case", "measured_paths", "rule_takes", "switch_of",
]  # fmt: skip

FILE = "prefix_h100.csv"
PATHS = ("direct", "gather", "hybrid")
LONGEST = 1 << 14
PEAK = ": peak memory"


@dataclass(frozen=True)
class MeasuredPaths:
    """One batch of the benchmark.

    Attributes:
        case: the batch.
        times: median time in µs by implementation, such as "direct" or "auto".
        peaks: peak memory of one call in bytes, beyond its inputs, by implementation.
        machine: GPU, date and versions.
    """

    case: PrefixCase
    times: Mapping[str, float]
    peaks: Mapping[str, int]
    machine: str

    @property
    def best(self) -> float:
        """The time of the fastest path in µs."""
        return min(self.times[path] for path in PATHS if path in self.times)


def measured_paths(*parts: str) -> list[MeasuredPaths]:
    """The measured batches of some parts of the benchmark, in the order of the file.

    Args:
        parts: of `PrefixCase.part`; none means all.

    Raises:
        FileNotFoundError: the folder of results is missing.
    """
    return [measured for measured in _read() if not parts or measured.case.part in parts]


@cache
def _read() -> tuple[MeasuredPaths, ...]:
    known = {case.name: case for case in cases(torch.device("cuda"))}
    found: dict[str, list[report.Row]] = {}
    for row in report.read(find_results() / FILE):
        if row.case in known:
            found.setdefault(row.case, []).append(row)
    return tuple(
        MeasuredPaths(
            known[name],
            {row.implementation: row.p50_us for row in rows if not row.implementation.endswith(PEAK)},
            {row.implementation.removesuffix(PEAK): row.bytes for row in rows if row.implementation.endswith(PEAK)},
            f"{rows[0].device}, {rows[0].date}, torch {rows[0].torch}, triton {rows[0].triton}",
        )
        for name, rows in found.items()
    )


def facts_of_case(case: PrefixCase, hopper: bool = False) -> Facts:
    """The inputs of the rule for a batch of the benchmark on a GPU.

    Args:
        case: the batch.
        hopper: whether the Hopper kernel attends on the direct path. The rows of `FILE` are older than it.
    """
    common = 0 if case.window is not None else min(case.cached) // STEP * STEP
    return Facts(
        lengths=tuple(zip(case.new, case.lengths, strict=True)), common=common, kv_heads=case.kv_heads,
        group=case.q_heads // case.kv_heads, head_dim=case.head_dim, v_head_dim=case.head_dim, itemsize=1,
        dtype=torch.bfloat16, device="cuda", triton=True, window=case.window, hopper=hopper,
    )  # fmt: skip


def rule_takes(case: PrefixCase, hopper: bool = False) -> str:
    """The path that `auto` takes for a batch of the benchmark on a GPU, by the rule of `kvgather.attention.choose`.

    Args:
        case, hopper: as in `facts_of_case`.
    """
    return choose(facts_of_case(case, hopper)).path


def expected_of_case(case: PrefixCase) -> dict[str, float]:
    """The time of each path in µs that the rule expects for a batch of the benchmark on a GPU.

    Args:
        case: its head dim is at most the largest of `SPEEDS`.
    """
    speeds = next(speeds for dim, speeds in SPEEDS.items() if case.head_dim <= dim)
    return expected_times(facts_of_case(case), speeds)


def switch_of(case: PrefixCase) -> int:
    """The smallest number of new tokens of each sequence at which `auto` does not take the direct path.

    Args:
        case: its number of new tokens does not matter.

    Raises:
        ValueError: the rule takes the direct path for up to 16,384 new tokens.
    """
    for new in range(1, LONGEST + 1):
        if rule_takes(replace(case, new=(new,) * len(case.new))) != "direct":
            return new
    raise ValueError(f"case is {case.name}; accepted: a case in which auto leaves the direct path")
