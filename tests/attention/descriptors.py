"""Checks, in a compiled kernel, the addresses that Hopper's tensor cores read: machine code against PTX, without a GPU.

A `wgmma` instruction finds an operand in shared memory through a 64-bit descriptor: bits 0-13 hold the address in units
of 16 bytes, the others how the operand is stored. PTX says each as "address of the buffer, plus constant". In machine
code (`HGMMA`) descriptors are in uniform registers. `faults` follows these registers through the control flow and
reports every descriptor that is not one of the PTX's, and every uniform register that is read but never written.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.attention.ptx import promised
from tests.attention.registers import run
from tests.attention.sass import blocks


def faults(ptx: str, sass: str) -> list[str]:
    """What the machine code of one kernel addresses otherwise than its PTX; empty: nothing.

    Args:
        ptx: the kernel's PTX.
        sass: the same kernel as `nvdisasm -c` writes it.
    """
    found, unwritten = run(blocks(sass))
    expected = Counter(promised(ptx))
    words = [f"{at}: {one} is not in the PTX" for at, one in found.items() if one not in expected]
    if not words and len(found) == expected.total() and Counter(found.values()) != expected:
        words.append("one descriptor is used more often than in the PTX, and another less often")
    return [*words, *unwritten]


def tool(name: str) -> Path:
    """A tool of NVIDIA's, "ptxas" or "nvdisasm", as Triton has it; the test is skipped where there is none."""
    from triton import knobs

    try:
        return Path(getattr(knobs.nvidia, name).path)
    except RuntimeError as error:
        pytest.skip(f"no {name}: {error}")


def version_of(ptxas: Path) -> tuple[int, ...]:
    words = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release \d+\.\d+, V([\d.]+)", words)
    assert release, words
    return tuple(int(part) for part in release[1].split("."))


def disassembled(cubin: Path, nvdisasm: str | Path) -> str:
    """The machine code of a compiled kernel."""
    return subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
