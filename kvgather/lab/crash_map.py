"""For which block ids an out-of-bounds read of an ordinary scale faults: the map of `kvgather crash --map`.

The gather before the fix reads one scale per (block, head, page offset) of a scale that has one element, so the block
id decides how far behind the scalar it reads. Nothing is arranged: scales and pools are ordinary allocations. Each
block id runs in a child process of its own; on a GPU once as it is and once with CUDA_LAUNCH_BLOCKING=1.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import csv_text
from .child import AnswerError, answers, check_seconds, run_module
from .faults import diagnosis, died

HEADS, PAGE_SIZE, SCALE_BYTES = 8, 16, 4
BLOCK_IDS = (0, 1, 16, 256, 1024, 2048, 4096, 8192, *(2**n for n in range(14, 21)))
PARALLEL = {"cpu": 2, "cuda": 8}
"""Children at a time. One needs 4 GiB of a GPU's memory for its pools, and half a GiB for its context."""


@dataclass(frozen=True)
class Point:
    """One child process: a gather of one token, then an innocent call, then a copy of the rows to the host.

    Attributes:
        block_id: the block of the token.
        bytes_behind: bytes from the scalar to the first scale that the kernel reads.
        launch_blocking: 1 if CUDA_LAUNCH_BLOCKING was set to 1.
        outcome: "ok", "silent corruption", "illegal access", "segfault", "abort", "failed" or "timeout".
        raised_by: which of the three steps reported the error: "the gather", "the next call" (a `torch.randn`), or
            "the copy to the host"; empty without an error.
        scales_used: what K was multiplied by in the first and in the last head, in magnitude; "0.5 0.5" is right; empty
            if there are no rows.
        place: on a GPU, the segment of torch's allocator that has the address: "the scalar's segment",
            "the pool of K", "the pool of V", "another segment" or "no segment of torch".
        message: the error's message.
        num_blocks: blocks of the pools; 8 heads, pages of 16.
        device, driver, torch, triton, commit, date: machine, versions and date.
    """

    block_id: int
    bytes_behind: int
    launch_blocking: int
    outcome: str
    raised_by: str
    scales_used: str
    place: str
    message: str
    num_blocks: int
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    def __str__(self) -> str:
        blocking = ", CUDA_LAUNCH_BLOCKING=1" if self.launch_blocking else ""
        where = f" ({self.place})" if self.place else ""
        text = f"block {self.block_id:>9,}{blocking}: {self.bytes_behind:,} bytes behind{where}: {self.outcome}"
        if self.scales_used:
            text += f", scales {self.scales_used}"
        return (
            text
            + (f", raised by {self.raised_by}" if self.raised_by else "")
            + (f": {self.message}" if self.message else "")
        )


def bytes_behind(block_id: int, heads: int = HEADS, page_size: int = PAGE_SIZE) -> int:
    """Bytes from the scalar to element [block_id, 0, 0] of the scale that the kernel assumes, FP32."""
    return block_id * heads * page_size * SCALE_BYTES


def run_map(
    device: str,
    machine: Mapping[str, Any] | None = None,
    block_ids: Sequence[int] = BLOCK_IDS,
    *,
    timeout: float = 120.0,
) -> Iterator[Point]:
    """Run each block id in a child process, and yield the points in order.

    Args:
        device: "cpu" (Triton's interpreter) or "cuda".
        machine: the values of the attributes `device` to `date` of a point; empty by default.
        block_ids: the block ids; the pools have a block for the largest.
        timeout: seconds after which a child is killed.

    Raises:
        TypeError, ValueError: `timeout` is not a positive number of seconds, or exceeds 1e6 seconds.
    """
    timeout = check_seconds(timeout)
    jobs = [(block_id, blocking) for blocking in ((0, 1) if device == "cuda" else (0,)) for block_id in block_ids]
    num_blocks = max(block_ids) + 1
    with ThreadPoolExecutor(min(PARALLEL[device], os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda job: _run_one(job[0], job[1], num_blocks, device, machine or {}, timeout), jobs)


def _run_one(
    block_id: int, blocking: int, num_blocks: int, device: str, machine: Mapping[str, Any], timeout: float
) -> Point:
    found: dict[str, Any] = {"outcome": "failed", "raised_by": "", "scales_used": "", "place": "", "message": ""}
    blocking_variables = {"CUDA_LAUNCH_BLOCKING": str(blocking), "AMD_SERIALIZE_KERNEL": str(3 * blocking)}
    end = run_module(
        "kvgather.lab._crash_map_child", str(block_id), str(num_blocks), device, device=device, timeout=timeout,
        **blocking_variables,
    )  # fmt: skip
    if end.code is None:
        found |= {"outcome": "timeout", "message": f"no answer in {timeout:g} s"}
    else:
        answer: dict[str, object] = {"outcome": ""}
        try:
            for line in answers(iter(end.stdout.splitlines())):
                answer |= line
        except AnswerError as error:
            answer["message"] = str(error)
        found |= {name: str(value) for name, value in answer.items() if name in found}
        if died(end.code) or not found["outcome"]:
            cause = diagnosis(end.code, end.stderr)
            found |= {"outcome": str(cause["kind"]), "message": str(cause.get("message", cause.get("source", "")))}
    where: dict[str, Any] = {"block_id": block_id, "bytes_behind": bytes_behind(block_id), "launch_blocking": blocking}
    return Point(**where, num_blocks=num_blocks, **found, **machine)


def as_csv(points: Sequence[Point]) -> str:
    """Points as the text of a CSV file that `read_map` reads."""
    return csv_text([field.name for field in fields(Point)], map(asdict, points))


def read_map(path: Path) -> list[Point]:
    """The points of a CSV file; none if the file does not exist.

    Raises:
        ValueError: the file's columns are not a point's.
    """
    if not path.exists():
        return []
    numbers = {field.name for field in fields(Point) if str(field.type) == "int"}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = [field.name for field in fields(Point)]
        if reader.fieldnames != columns:
            raise ValueError(f"{path} has columns {reader.fieldnames}; accepted: {columns}")
        lines: list[dict[str, Any]] = [{k: int(v) if k in numbers else v for k, v in line.items()} for line in reader]
    return [Point(**line) for line in lines]
