"""Why the direct kernel widens narrow heads: ptxas 12.8 computes wrong addresses for operands of different widths.

The smallest kernel that shows it, and `descriptors`, which finds it in the machine code without a GPU: what the
checker says of a kernel is what the kernel does on an H100.
"""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvgather.lab.child import environment
from tests.attention.descriptors import disassembled, faults, tool, version_of

pytestmark = pytest.mark.triton

WIDE, NARROW = 64, 32
"""Columns of V; K has 64."""


def child(folder: Path, *words: object) -> tuple[list[dict[str, Any]], str]:
    """The child's answers and its standard error, whatever became of it."""
    env = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.attention._narrow_operands_child", *map(str, words)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert answers, done.stderr[-2000:]
    return answers, done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    answers, _ = child(tmp_path_factory.mktemp("triton"), WIDE, NARROW)
    return dict(zip((WIDE, NARROW), answers, strict=True))


def found(answer: dict[str, Any], folder: Path) -> list[str]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(base64.b64decode(answer["cubin"]))
    return faults(answer["ptx"], disassembled(cubin, tool("nvdisasm")))


def test_operands_of_one_width_are_addressed_as_the_ptx_says(
    compiled: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    assert compiled[WIDE]["ptx"].count("wgmma.mma_async") == 12
    assert found(compiled[WIDE], tmp_path) == []


def test_a_narrower_operand_is_addressed_from_a_register_that_was_never_written(
    compiled: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    if version_of(tool("ptxas")) >= (12, 9):
        pytest.skip(f"ptxas {version_of(tool('ptxas'))} is right here; 12.8 is wrong")
    words = found(compiled[NARROW], tmp_path)
    assert len([line for line in words if "64x32x16 transposed: unknown" in line]) == 7, words
    assert not [line for line in words if "64x128x16" in line], "K's are right"
    assert [line for line in words if "reads UR" in line and "never written" in line], words


def test_the_checker_sees_one_other_constant(compiled: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    """As if the machine code had an address 32 bytes off, or another way of storing the rows."""
    ptx = compiled[WIDE]["ptx"]
    first, ways = 0x4000004000000000, 0x8000004000000000 - 2**64
    one, others = first + 2, (first, first + 8, ways + 2)
    if f", {one};" not in ptx:  # Triton 3.9 adds 2 to the address before it joins address and constant
        one, others = first, (first + 2, first + 8, ways)
    assert f", {one};" in ptx
    for other in others:
        answer = compiled[WIDE] | {"ptx": ptx.replace(f", {one};", f", {other};", 1)}
        assert found(answer, tmp_path), hex(other)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [WIDE, NARROW])
def test_the_checker_says_what_an_h100_does(dim: int, tmp_path: Path) -> None:
    if torch.version.cuda is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the machine code checked is compute capability 9.0's")
    answers, stderr = child(tmp_path / "triton", dim, "run")
    error = answers[1]["error"] if len(answers) > 1 else math.inf
    if math.isinf(error):
        assert "illegal memory access" in stderr, stderr[-2000:]
    right = error <= 1e-2
    assert right == (found(answers[0], tmp_path) == []), error
    assert right or dim == NARROW
