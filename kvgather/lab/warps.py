"""What the lanes of a warp read together: a kernel's compiled layout, laid over the addresses of a traced run.

The trace knows which bytes a program reads, the compiler decides which lane of which warp reads each of them, and in
loads of how many bytes. Both are known without a GPU; put together they say how many sectors each load touches.
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
"""One number of four bytes: a record, an entry of a table, a scale. Not counted among the loads of codes."""
POOLS = {"K": ("k_ptr", "key_cache_ptr"), "V": ("v_ptr", "value_cache_ptr")}
"""What the kernels call the pools."""
SECTOR = 32
"""Bytes that an NVIDIA GPU moves at the least."""


@dataclass(frozen=True)
class Layout:
    """How the elements of a tile are dealt out; each attribute has a number for each axis of the tile.

    Attributes:
        per_lane: neighbouring elements that one lane holds.
        lanes: of a warp.
        warps: of the program.
        order: the axes, the one that neighbouring lanes walk first.
    """

    per_lane: tuple[int, ...]
    lanes: tuple[int, ...]
    warps: tuple[int, ...]
    order: tuple[int, ...]

    def elements(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """The flat index in a tile of each (warp, lane, register), `[warps, lanes, registers]`.

        Where the tile is smaller than the program, several lanes hold the same element.
        """
        reach = [p * n * w for p, n, w in zip(self.per_lane, self.lanes, self.warps, strict=True)]
        repeats = [max(1, size // r) for size, r in zip(shape, reach, strict=True)]
        warp, lane, held, again = (_places(counts, self.order) for counts in
                                   (self.warps, self.lanes, self.per_lane, repeats))  # fmt: skip
        flat: NDArray[np.int64] = np.zeros((1, 1, 1, 1), np.int64)
        for axis, size in enumerate(shape):
            inner = held[axis] + self.per_lane[axis] * (
                lane[axis][:, None, None] + self.lanes[axis] * warp[axis][:, None, None, None]
            )
            place = (inner + reach[axis] * again[axis][:, None]) % size  # [warps, lanes, repeats, per lane]
            flat = flat * size + place
        return flat.reshape(len(warp[0]), len(lane[0]), -1)


def _places(counts: Sequence[int], order: Sequence[int]) -> list[NDArray[np.int64]]:
    """The place along each axis of the nth of `prod(counts)` things, the first axis of `order` counted fastest."""
    n = np.arange(math.prod(counts))
    places = [n] * len(counts)
    for axis in order:
        n, places[axis] = n // counts[axis], n % counts[axis]
    return places


@dataclass(frozen=True)
class TileLoad:
    """One load of a tile of codes: its shape, its layout, and the bytes that one instruction moves for a lane."""

    shape: tuple[int, ...]
    layout: Layout
    width: int

    def of_warps(self, access: Access) -> NDArray[np.int64]:
        """The bytes that each load of each warp reads, `[loads, lanes, width]`; −1 for lanes that are off.

        Args:
            access: the same load in a trace, of one-byte codes.

        Raises:
            ValueError: the access has another shape.
        """
        if access.bytes.shape != self.shape or access.width != 1:
            raise ValueError(
                f"access has shape {access.bytes.shape} of {access.width} bytes; accepted: {self.shape} of 1"
            )
        at = np.where(access.mask, access.bytes, -1).ravel()[self.layout.elements(self.shape)]
        warps, lanes, held = at.shape
        return at.reshape(warps, lanes, held // self.width, self.width).swapaxes(1, 2).reshape(-1, lanes, self.width)


@dataclass(frozen=True)
class Reads:
    """What a run reads of one pool.

    Attributes:
        programs: that read the pool; those of a plan's unused records do not.
        lookups: their loads of anything but the two pools: records, tables, scales.
        loads: of warps, from this pool; one that has all its lanes off is none.
        sectors: that these loads touch, each load counted for itself.
        used: bytes that the programs asked for.
    """

    programs: int
    lookups: int
    loads: int
    sectors: int
    used: int


def reads(trace: Trace, compiled: Compiled, pool: str = "V") -> Reads:
    """Count a traced run as the compiled kernel would make it.

    Args:
        trace: of a launch of the same kernel, for the same heads, page and head_dim.
        compiled: it, for an NVIDIA GPU.
        pool: "K" or "V".
    """
    tile = compiled.tiles()["KV".index(pool)]
    asked = [access for access in trace.select(kind="load") if access.argument in POOLS[pool] and access.mask.any()]
    loads = [load for access in asked for load in tile.of_warps(access) if (load >= 0).any()]
    programs = {access.program for access in asked}
    others = [access for access in trace.select(kind="load") if access.argument not in (*POOLS["K"], *POOLS["V"])]
    return Reads(
        programs=len(programs),
        lookups=sum(access.program in programs for access in others),
        loads=len(loads),
        sectors=sum(map(sectors, loads)),
        used=sum(int(access.mask.sum()) for access in asked),
    )


def sectors(addresses: NDArray[np.int64]) -> int:
    """How many 32-byte sectors hold these bytes; negative ones are none."""
    return len(np.unique(addresses[addresses >= 0] // SECTOR))


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    Attributes:
        name, target: which.
        text: the assembly, PTX or AMD's; empty if there is none.
        layouts: Triton's own last form of the kernel, which names the layouts.
        lanes: of a warp there.
        num_warps: of a program.
        error: why there is no assembly, in Triton's words.
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
        """How often each instruction is there that loads more than one number of four bytes."""
        return {name: n for name, n in widths(self.text).items() if not _is_store(name) and name != LOOKUP}

    @property
    def stores(self) -> dict[str, int]:
        """The same for stores."""
        return {name: n for name, n in widths(self.text).items() if _is_store(name)}

    def tiles(self) -> list[TileLoad]:
        """The kernel's loads of codes, in their order: K, then V.

        Raises:
            AssemblyError: PTX does not have the loads that the layouts ask for, or it is no PTX.
        """
        known = {name: _layout(text) for name, text in re.findall(r"^(#\w+) = (#ttg\.blocked<.*)$", self.layouts, re.M)}
        names = [n for n in re.findall(r"\b(ld\.(?:[\w:]+\.)*global[\w.:]*)", self.text) if n != LOOKUP]
        found = []
        for dims, layout_name in _TILE.findall(self.layouts):
            shape, layout = tuple(map(int, dims.rstrip("x").split("x"))), known[layout_name]
            wanted = layout.elements(shape).shape[2]
            if not names:
                raise AssemblyError(f"{self.name} for {self.target} has fewer loads than tiles")
            size = width(names[0])
            count = max(1, wanted // size)
            if set(map(width, names[:count])) != {size} or len(names) < count:
                raise AssemblyError(f"{self.name} for {self.target} loads a tile in pieces of different widths")
            names = names[count:]
            found.append(TileLoad(shape, layout, size))
        return found


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
        jobs: for each a name of chapter 07's kernels, such as "2 tile", a case with its `num_blocks`, and
            one of `assembly.TARGETS`. A name of several lines is the source of a kernel that copies a page of K in
            SHUFFLE: `(out_ptr, k_ptr, block, HEADS, PAGE, DIM)`.
        timeout: seconds that all of it may take.

    Yields:
        One `Compiled` for each job, in their order, as they are done; a failed compilation does not raise: its `error`
        says why.

    Raises:
        AssemblyError: there is no such target, or the child ended early or printed something that is no answer.
    """
    for _, _, target in jobs:
        if target not in TARGETS:
            raise AssemblyError(f"target is {target!r}; accepted: {', '.join(TARGETS)}")
    timeout = check_seconds(timeout)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "words", "w+b") as words:
        variables = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=folder)
        run, pipe = command("kvgather.lab._steps_child", seconds=timeout), subprocess.PIPE
        with subprocess.Popen(run, stdin=pipe, stdout=pipe, stderr=words, env=variables) as child:
            assert child.stdin is not None and child.stdout is not None
            timer = threading.Timer(timeout, child.kill)
            timer.start()
            try:
                with suppress(BrokenPipeError):  # a child that is gone has no answer either
                    child.stdin.write(pickle.dumps(list(jobs)))
                    child.stdin.close()
                answered = answers(line.decode(errors="replace") for line in child.stdout)
                for name, _, target in jobs:
                    answer = next(answered, None)
                    if answer is None:
                        words.seek(0)
                        said = words.read().decode(errors="replace").strip().splitlines()[-3:]
                        raise AssemblyError(f"no answer for {name!r:.40}, exit {child.wait()}: {' | '.join(said)}")
                    yield _compiled(name, target, answer)
            except AnswerError as error:
                raise AssemblyError(str(error)) from None
            finally:
                timer.cancel()
                child.kill()
