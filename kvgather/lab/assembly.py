"""The gather kernel's assembly for GPUs that are not here, and how many bytes each of its instructions moves.

Triton compiles for a target that this machine need not have, but not in a process that has its interpreter on. So it
runs in a child process of its own, from shapes alone: the pools, scales and rows it compiles for have no memory.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cases import Case
from .child import AnswerError, answers, check_seconds, command, environment

TARGETS = (
    "cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120",
    "hip:gfx90a", "hip:gfx942", "hip:gfx950", "hip:gfx1100", "hip:gfx1201", "hip:gfx1250",
)  # fmt: skip
"""NVIDIA's by compute capability, from Ampere to Blackwell; AMD's by name, from CDNA2 and RDNA3 on."""

_PTX = re.compile(r"\b((?:ld|st)\.(?:[\w:]+\.)*global[\w.:]*)")
_AMD = re.compile(r"^\s*((?:global|buffer|flat)_(?:load|store)_\w+)", re.MULTILINE)


class AssemblyError(ValueError):
    """There is no such target, or Triton cannot compile for it; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernel: what a launch for this case would ask for.

    Attributes:
        case: the cache and the rows; `num_blocks` is the pool's size, which decides how AMD GPUs address it.
        by_table: pages are found in a block table, as in the engines' call, and not in a plan's records.
        heads_outermost: each pool has its heads outside its blocks, as when one tensor holds a pool for each head.
        for_attention: V's rows of a bad block id are 0, as attention gathers them.
    """

    case: Case
    heads_outermost: bool = False
    by_table: bool = False
    for_attention: bool = False

    @property
    def name(self) -> str:
        flags = ("heads_outermost", "by_table", "for_attention")
        return "-".join([self.case.name, *(flag for flag in flags if getattr(self, flag))])


@dataclass(frozen=True)
class Assembly:
    """What became of one compilation.

    Attributes:
        variant, target: of what, and for what.
        text: the assembly, PTX or AMD's; empty if there is none.
        lanes: threads of a warp (NVIDIA) or a wave (AMD) there.
        constants: the kernel's constexpr values and `num_warps`.
        error: why there is no assembly, in Triton's words.
    """

    variant: Variant
    target: str
    text: str = ""
    lanes: int = 0
    constants: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def compile_all(jobs: Sequence[tuple[Variant, str]], *, timeout: float = 300.0) -> list[Assembly]:
    """Compile the gather kernel for targets, in a child process; needs no GPU.

    Args:
        jobs: pairs of a variant and one of `TARGETS`.
        timeout: seconds that all of it may take.

    Returns:
        One `Assembly` for each job, in their order. A failed compilation does not raise: its `error` says why.

    Raises:
        AssemblyError: there is no such target, or the child did not answer in time.
    """
    for _, target in jobs:
        if target not in TARGETS:
            raise AssemblyError(f"target is {target!r}; accepted: {', '.join(TARGETS)}")
    timeout = check_seconds(timeout)
    done: list[Assembly] = []
    with tempfile.TemporaryDirectory() as cache:  # a compiler's cache would hide what this Triton can do
        variables = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
        while len(done) < len(jobs):
            try:
                child = subprocess.run(
                    command("kvgather.lab._assembly_child", seconds=timeout),
                    input=pickle.dumps(list(jobs[len(done) :])),
                    env=variables,
                    capture_output=True,
                    timeout=timeout,
                )
            except subprocess.TimeoutExpired:
                raise AssemblyError(f"{len(jobs)} compilations took longer than {timeout:g} s") from None
            before, lines = len(done), child.stdout.decode(errors="replace").splitlines()
            try:
                for job, answer in zip(jobs[before:], answers(iter(lines)), strict=False):
                    done.append(_assembly(job, answer))
            except AnswerError as error:
                done.append(Assembly(*jobs[len(done)], error=str(error)))
            if len(done) == before:  # LLVM ended the process, and not for something that an earlier job left behind
                words = child.stderr.decode(errors="replace").strip().splitlines()[-3:]
                done.append(Assembly(*jobs[len(done)], error=f"exit {child.returncode}: " + " | ".join(words)))
    return done


def _assembly(job: tuple[Variant, str], answer: dict[str, Any]) -> Assembly:
    try:
        return Assembly(*job, **answer)
    except TypeError:
        raise AnswerError(f"the child printed the keys {', '.join(answer)}, which are not an assembly's") from None


def compile_for(case: Case, target: str) -> str:
    """The assembly that a gather of a case runs on a target.

    Args:
        case: the cache and the rows.
        target: one of `TARGETS`.

    Raises:
        AssemblyError: Triton cannot compile it for that target.
    """
    assembly = compile_all([(Variant(case), target)])[0]
    if not assembly.text:
        raise AssemblyError(f"target is {target!r}; the installed Triton: {assembly.error}")
    return assembly.text


def widths(assembly: str) -> dict[str, int]:
    """The instructions that load from and store to the GPU's memory, and how often each is there.

    Args:
        assembly: PTX, or AMD's assembly.

    Returns:
        Counts by instruction, such as `{"ld.global.v4.b32": 2}` or `{"global_load_dwordx4": 2}`, in their first order.
        Loads through AMD's scalar unit, which fetch a kernel's arguments and records, are not counted.
    """
    return dict(Counter(_PTX.findall(assembly) or _AMD.findall(assembly)))


def width(instruction: str) -> int:
    """The bytes that one thread moves with one of the instructions that `widths` counts.

    Raises:
        AssemblyError: the instruction's name does not say.
    """
    if ptx := re.search(r"(?:\.v(\d+))?\.[bsuf](\d+)$", instruction):
        return int(ptx[1] or 1) * int(ptx[2]) // 8
    if words := re.search(r"_dword(?:x(\d))?$", instruction):
        return 4 * int(words[1] or 1)
    if small := re.search(r"_[su]?(byte|short)(?:_d16)?(?:_hi)?$", instruction):
        return {"byte": 1, "short": 2}[small[1]]
    if bits := re.search(r"_[bui](\d+)$", instruction):
        return int(bits[1]) // 8
    raise AssemblyError(f"instruction is {instruction!r}; accepted: a load or store of PTX or of an AMD GPU")
