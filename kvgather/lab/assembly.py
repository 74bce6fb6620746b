"""The gather kernel's assembly for any GPU that Triton supports, and how many bytes each of its instructions moves.

Triton can compile for a GPU that this machine does not have, but not in a process whose interpreter is enabled. The
compilation therefore runs in a child process. Its pools, scales and rows are meta tensors.
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
"""NVIDIA GPUs by compute capability, from Ampere to Blackwell; AMD GPUs by name, from CDNA2 and RDNA3 on."""
ERROR_LENGTH = 500
"""Characters of a compiler's message that a compilation in a child process returns at most."""

_PTX = re.compile(r"\b((?:ld|st)\.(?:[\w:]+\.)*global[\w.:]*)")
_AMD = re.compile(r"^\s*((?:global|buffer|flat)_(?:load|store)_\w+)", re.MULTILINE)


class AssemblyError(ValueError):
    """A target does not exist, or Triton cannot compile for it; the message gives the cause."""


@dataclass(frozen=True)
class Variant:
    """One specialization of the kernel: the one that a launch for this case compiles.

    Attributes:
        case: the cache and the rows; `num_blocks` is the pool's size, which decides how AMD GPUs address the pool.
        heads_outermost: whether heads are the outermost axis of each pool, as in one tensor with a pool for each head.
        by_table: whether the kernel reads block ids from a block table, as in the engines' call, instead of from a
            plan's records.
        for_attention: whether V's rows of a bad block id are 0, as attention requires, instead of NaN.
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
    """The result of one compilation.

    Attributes:
        variant, target: the specialization and the GPU.
        text: the assembly, PTX or AMD's; empty if the compilation failed.
        lanes: threads of a warp (NVIDIA) or a wave (AMD) of the target.
        constants: the kernel's constexpr values and `num_warps`.
        error: Triton's error message if the compilation failed.
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
        timeout: seconds that the child may take.

    Returns:
        One `Assembly` for each job, in the order of `jobs`. A failed compilation does not raise; `error` gives its
        cause.

    Raises:
        AssemblyError: a target does not exist, or the child exceeded `timeout`.
    """
    for _, target in jobs:
        if target not in TARGETS:
            raise AssemblyError(f"target is {target!r}; accepted: {', '.join(TARGETS)}")
    timeout = check_seconds(timeout)
    results: list[Assembly] = []
    with tempfile.TemporaryDirectory() as cache:  # an old cache may contain kernels that this Triton cannot compile
        variables = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
        while len(results) < len(jobs):
            try:
                child = subprocess.run(
                    command("kvgather.lab._assembly_child", seconds=timeout),
                    input=pickle.dumps(list(jobs[len(results) :])),
                    env=variables,
                    capture_output=True,
                    timeout=timeout,
                )
            except subprocess.TimeoutExpired:
                raise AssemblyError(f"{len(jobs)} compilations took longer than {timeout:g} s") from None
            first, lines = len(results), child.stdout.decode(errors="replace").splitlines()
            try:
                for job, answer in zip(jobs[first:], answers(iter(lines)), strict=False):
                    results.append(_assembly(job, answer))
            except AnswerError as error:
                results.append(Assembly(*jobs[len(results)], error=str(error)))
            if len(results) == first:  # LLVM aborted a child whose first job this was, so no earlier job is the cause
                last_lines = child.stderr.decode(errors="replace").strip().splitlines()[-3:]
                error_text = f"exit {child.returncode}: " + " | ".join(last_lines)
                results.append(Assembly(*jobs[len(results)], error=error_text))
    return results


def _assembly(job: tuple[Variant, str], answer: dict[str, Any]) -> Assembly:
    try:
        return Assembly(*job, **answer)
    except TypeError:
        raise AnswerError(f"the child printed the keys {', '.join(answer)}, which are not an assembly's") from None


def compile_for(case: Case, target: str) -> str:
    """The assembly of the kernel that gathers a case on a target.

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
    """Count the instructions that load from and store to the GPU's memory.

    Args:
        assembly: PTX, or AMD's assembly.

    Returns:
        Counts by instruction, such as `{"ld.global.v4.b32": 2}` or `{"global_load_dwordx4": 2}`, in the order of first
        occurrence. Loads through AMD's scalar unit, which fetch a kernel's arguments and records, are not counted.
    """
    return dict(Counter(_PTX.findall(assembly) or _AMD.findall(assembly)))


def width(instruction: str) -> int:
    """The bytes that one thread moves with an instruction that `widths` counts.

    Raises:
        AssemblyError: the instruction's name does not contain a width.
    """
    if ptx := re.search(r"(?:\.v(\d+))?\.[bsuf](\d+)$", instruction):
        return int(ptx[1] or 1) * int(ptx[2]) // 8
    if dwords := re.search(r"_dword(?:x(\d))?$", instruction):
        return 4 * int(dwords[1] or 1)
    if narrow := re.search(r"_[su]?(byte|short)(?:_d16)?(?:_hi)?$", instruction):
        return {"byte": 1, "short": 2}[narrow[1]]
    if bits := re.search(r"_[bui](\d+)$", instruction):
        return int(bits[1]) // 8
    raise AssemblyError(f"instruction is {instruction!r}; accepted: a load or store of PTX or of an AMD GPU")
