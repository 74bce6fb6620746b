"""The sectors that each load of a warp touches: a kernel's compiled layout applied to the addresses of a trace.

A trace gives the bytes that a program reads. The compiled kernel gives the lane and the warp that read each byte, and
the width of each load. Both are available without a GPU, and together they determine the sectors of each load.
"""

from __future__ import annotations

import math
import pickle
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cases import Case
from .assembly import TARGETS, AssemblyError, width, widths
from .child import AnswerError, answers, check_seconds, command, environment
from .trace import Access, Trace

_LAYOUT = re.compile(
    r"#ttg\.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], "
    r"warpsPerCTA = \[([\d, ]+)\], order = \[([\d, ]+)\]"
)
_TILE = re.compile(r"tt\.load .*: tensor<((?:\d+x)+)!tt\.ptr<(?:i8|u8|f8\w+)>, (#\w+)>")
LOOKUP = "ld.global.b32"
"""A load of one four-byte number: a field of a record, an entry of a table, a scale. It loads no codes."""
POOLS = {"K": ("k_ptr", "key_cache_ptr"), "V": ("v_ptr", "value_cache_ptr")}
"""The kernels' names for the pools."""
SECTOR = 32
"""Bytes of a sector, the smallest unit that an NVIDIA GPU reads from memory."""


@dataclass(frozen=True)
class Layout:
    """Triton's blocked layout: the distribution of a tile's elements over lanes and warps.

    Attributes:
        per_lane: contiguous elements of one lane along each axis of the tile.
        lanes: lanes of a warp along each axis.
        warps: warps of the program along each axis.
        order: the axes, fastest varying first.
    """

    per_lane: tuple[int, ...]
    lanes: tuple[int, ...]
    warps: tuple[int, ...]
    order: tuple[int, ...]

    def elements(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """The flat index in a tile of each (warp, lane, register), `[warps, lanes, registers]`.

        If the tile has fewer elements than the program has registers, an element occurs more than once.
        """
        period = [p * n * w for p, n, w in zip(self.per_lane, self.lanes, self.warps, strict=True)]
        repeats = [max(1, size // elements) for size, elements in zip(shape, period, strict=True)]
        warp, lane, register, repeat = (_coordinates(counts, self.order) for counts in
                                        (self.warps, self.lanes, self.per_lane, repeats))  # fmt: skip
        flat: NDArray[np.int64] = np.zeros((1, 1, 1, 1), np.int64)
        for axis, size in enumerate(shape):
            index = register[axis] + self.per_lane[axis] * (
                lane[axis][:, None, None] + self.lanes[axis] * warp[axis][:, None, None, None]
            )
            index = (index + period[axis] * repeat[axis][:, None]) % size  # [warps, lanes, repeats, per lane]
            flat = flat * size + index
        return flat.reshape(len(warp[0]), len(lane[0]), -1)


def _coordinates(counts: Sequence[int], order: Sequence[int]) -> list[NDArray[np.int64]]:
    """The coordinate along each axis of the flat indices 0 to `prod(counts)` - 1; `order` is fastest first."""
    flat = np.arange(math.prod(counts))
    coordinates = [flat] * len(counts)
    for axis in order:
        flat, coordinates[axis] = flat // counts[axis], flat % counts[axis]
    return coordinates


@dataclass(frozen=True)
class TileLoad:
    """One load of a tile of codes: its shape, its layout, and the bytes that one instruction moves for a lane."""

    shape: tuple[int, ...]
    layout: Layout
    width: int

    def of_warps(self, access: Access) -> NDArray[np.int64]:
        """The bytes that each load of each warp reads, `[loads, lanes, width]`; −1 for disabled lanes.

        Args:
            access: this load in a trace, with elements of one byte.

        Raises:
            ValueError: the access has another shape.
        """
        if access.bytes.shape != self.shape or access.width != 1:
            raise ValueError(
                f"access has shape {access.bytes.shape} of {access.width} bytes; accepted: {self.shape} of 1"
            )
        offsets = np.where(access.mask, access.bytes, -1).ravel()[self.layout.elements(self.shape)]
        warps, lanes, registers = offsets.shape
        loads = offsets.reshape(warps, lanes, registers // self.width, self.width)
        return loads.swapaxes(1, 2).reshape(-1, lanes, self.width)


@dataclass(frozen=True)
class Reads:
    """The reads of a run from one pool.

    Attributes:
        programs: programs that read the pool; a program of an unused record reads nothing.
        lookups: loads of these programs from other tensors: records, tables, scales.
        loads: loads of warps from this pool, without those whose lanes are all disabled.
        sectors: the sum over these loads of the sectors that each touches.
        used: bytes that enabled lanes read.
    """

    programs: int
    lookups: int
    loads: int
    sectors: int
    used: int


def reads(trace: Trace, compiled: Compiled, pool: str = "V") -> Reads:
    """Count the loads that the compiled kernel makes in a traced run.

    Args:
        trace: the trace of one launch.
        compiled: the traced kernel, compiled for an NVIDIA GPU with the launch's heads, page and head_dim.
        pool: "K" or "V".
    """
    tile = compiled.tiles()["KV".index(pool)]
    accesses = [access for access in trace.select(kind="load") if access.argument in POOLS[pool] and access.mask.any()]
    loads = [load for access in accesses for load in tile.of_warps(access) if (load >= 0).any()]
    programs = {access.program for access in accesses}
    others = [access for access in trace.select(kind="load") if access.argument not in (*POOLS["K"], *POOLS["V"])]
    return Reads(
        programs=len(programs),
        lookups=sum(access.program in programs for access in others),
        loads=len(loads),
        sectors=sum(map(sectors, loads)),
        used=sum(int(access.mask.sum()) for access in accesses),
    )


def sectors(addresses: NDArray[np.int64]) -> int:
    """The number of 32-byte sectors that contain these bytes; negative addresses are ignored."""
    return len(np.unique(addresses[addresses >= 0] // SECTOR))


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target.

    Attributes:
        name, target: the kernel and the GPU.
        text: the assembly, PTX or AMD's; empty if the compilation failed.
        layouts: the kernel in Triton's GPU dialect (TTGIR), which defines the layouts.
        lanes: lanes of a warp of the target.
        num_warps: warps of a program.
        error: Triton's error message if the compilation failed.
    """

    name: str
    target: str
    text: str = ""
    layouts: str = ""
    lanes: int = 0
    num_warps: int = 0
    error: str = ""

    @property
    def loads(self) -> dict[str, int]:
        """The number of occurrences of each load instruction other than `LOOKUP`."""
        return {name: n for name, n in widths(self.text).items() if not _is_store(name) and name != LOOKUP}

    @property
    def stores(self) -> dict[str, int]:
        """The number of occurrences of each store instruction."""
        return {name: n for name, n in widths(self.text).items() if _is_store(name)}

    def tiles(self) -> list[TileLoad]:
        """The kernel's loads of codes, K before V.

        Raises:
            AssemblyError: the loads in the assembly do not match the layouts, or the assembly is not PTX.
        """
        blocked = re.findall(r"^(#\w+) = (#ttg\.blocked<.*)$", self.layouts, re.M)
        layouts = {name: _layout(text) for name, text in blocked}
        loads = [n for n in re.findall(r"\b(ld\.(?:[\w:]+\.)*global[\w.:]*)", self.text) if n != LOOKUP]
        tiles = []
        for dims, layout_name in _TILE.findall(self.layouts):
            shape, layout = tuple(map(int, dims.rstrip("x").split("x"))), layouts[layout_name]
            registers = layout.elements(shape).shape[2]
            if not loads:
                raise AssemblyError(f"{self.name} for {self.target} has fewer loads than tiles")
            size = width(loads[0])
            count = max(1, registers // size)
            if set(map(width, loads[:count])) != {size} or len(loads) < count:
                raise AssemblyError(f"{self.name} for {self.target} loads a tile in pieces of different widths")
            loads = loads[count:]
            tiles.append(TileLoad(shape, layout, size))
        return tiles


def _layout(text: str) -> Layout:
    match = _LAYOUT.match(text)
    if match is None:
        raise AssemblyError(f"layout is {text[:80]!r}; accepted: a blocked layout")
    return Layout(*(tuple(map(int, part.split(","))) for part in match.groups()))


def _is_store(instruction: str) -> bool:
    return instruction.startswith("st.") or "_store" in instruction


def _compiled(name: str, target: str, answer: dict[str, Any]) -> Compiled:
    try:
        return Compiled(name, target, **answer)
    except TypeError:
        raise AnswerError(f"the child printed the keys {', '.join(answer)}, which are not a kernel's") from None


def compile_steps(jobs: Sequence[tuple[str, Case, str]], *, timeout: float = 300.0) -> Iterator[Compiled]:
    """Compile kernels of chapter 07 for targets, in a child process; needs no GPU.

    Args:
        jobs: tuples of the name of a kernel of chapter 07, such as "2 tile", a case with its `num_blocks`, and one of
            `assembly.TARGETS`. A name of more than one line is the source of a kernel that copies a page of K in
            SHUFFLE: `(out_ptr, k_ptr, block, HEADS, PAGE, DIM)`.
        timeout: seconds that the child may take.

    Yields:
        One `Compiled` for each job, in the order of `jobs`, as soon as it is compiled. A failed compilation does not
        raise; `error` gives its cause.

    Raises:
        AssemblyError: a target does not exist, or the child ended early or printed a line that is no answer.
    """
    for _, _, target in jobs:
        if target not in TARGETS:
            raise AssemblyError(f"target is {target!r}; accepted: {', '.join(TARGETS)}")
    timeout = check_seconds(timeout)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "stderr", "w+b") as stderr:
        variables = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=folder)
        run, pipe = command("kvgather.lab._steps_child", seconds=timeout), subprocess.PIPE
        with subprocess.Popen(run, stdin=pipe, stdout=pipe, stderr=stderr, env=variables) as child:
            assert child.stdin is not None and child.stdout is not None
            timer = threading.Timer(timeout, child.kill)
            timer.start()
            try:
                with suppress(BrokenPipeError):  # the child has exited: the missing answer raises below
                    child.stdin.write(pickle.dumps(list(jobs)))
                    child.stdin.close()
                child_answers = answers(line.decode(errors="replace") for line in child.stdout)
                for name, _, target in jobs:
                    answer = next(child_answers, None)
                    if answer is None:
                        stderr.seek(0)
                        last_lines = stderr.read().decode(errors="replace").strip().splitlines()[-3:]
                        last = " | ".join(last_lines)
                        raise AssemblyError(f"no answer for {name!r:.40}, exit {child.wait()}: {last}")
                    yield _compiled(name, target, answer)
            except AnswerError as error:
                raise AssemblyError(str(error)) from None
            finally:
                timer.cancel()
                child.kill()
