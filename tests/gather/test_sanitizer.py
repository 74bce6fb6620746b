"""compute-sanitizer's word on it: no gather from a bad block table leaves its tensors, and the old kernel does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gather import sanitized
from tests.where import interpreted

ROOT = Path(__file__).parents[2]
CUDA = os.environ.get("CUDA_HOME", "/usr/local/cuda")
TOOL = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), f"{CUDA}/bin")))
SAW = 9  # its exit status when it saw errors and the program itself ended well
needs_the_tool = pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer, of the CUDA toolkit")


@dataclass(frozen=True)
class Verdict:
    """What the tool said: how many errors, None if it did not come to its end; and which of them are accesses."""

    errors: int | None
    accesses: tuple[str, ...]


def verdict(output: str) -> Verdict:
    """Read the tool's output."""
    summary = re.findall(r"^========= ERROR SUMMARY: (\d+) errors?", output, re.MULTILINE)
    accesses = re.findall(r"^========= (Invalid __\w+__ (?:read|write|atomic).*)$", output, re.MULTILINE)
    return Verdict(int(summary[-1]) if summary else None, tuple(accesses))


def run_under_the_tool(what: str) -> tuple[int, str]:
    """The exit status and the output of a child of its own, each of its tensors in an allocation of its own."""
    assert TOOL is not None
    done = subprocess.run(
        [
            TOOL, "--tool", "memcheck", "--error-exitcode", str(SAW), "--report-api-errors", "no",
            "--target-processes", "application-only", sys.executable, "-m", "tests.gather.sanitized", what, "cuda",
        ],
        cwd=ROOT, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.gpu
@needs_the_tool
def test_no_gather_from_a_bad_table_leaves_its_tensors() -> None:
    status, output = run_under_the_tool("good")
    assert f"{sanitized.GATHERS} gathers are right" in output, output[-4000:]
    assert verdict(output) == Verdict(0, ()), output[-4000:]
    assert status == 0


@pytest.mark.gpu
@needs_the_tool
def test_the_tool_sees_the_kernel_as_it_was() -> None:
    status, output = run_under_the_tool("before")
    seen = verdict(output)
    assert status != 0 and seen.errors != 0, output[-4000:]
    assert any(line.startswith("Invalid __global__ read of size 4 bytes") for line in seen.accesses), output[-4000:]


@pytest.mark.triton
@interpreted
def test_what_the_tool_watches_reads_nothing_outside_in_the_interpreter() -> None:
    from kvgather.lab.trace import trace

    with trace(strict=True) as t:
        assert sanitized.good("cpu") == sanitized.GATHERS == len(t.launches)
    assert not t.violations, t.report()


def test_reading_what_the_tool_says() -> None:
    clean = "========= COMPUTE-SANITIZER\n18 gathers are right\n========= ERROR SUMMARY: 0 errors\n"
    assert verdict(clean) == Verdict(0, ())
    bad = (
        "========= COMPUTE-SANITIZER\n"
        "========= Invalid __global__ read of size 4 bytes\n"
        "=========     at gather_one_head_kernel+0x3a0 in before_fix.py:73\n"
        "=========     by thread (0,0,0) in block (0,0,0)\n"
        "=========     Access to 0x7f2c40400a00 is out of bounds\n"
        "=========     and is 2,041 bytes after the nearest allocation at 0x7f2c40400200 of size 4 bytes\n"
        "========= ERROR SUMMARY: 1 error\n"
    )
    assert verdict(bad) == Verdict(1, ("Invalid __global__ read of size 4 bytes",))
    assert verdict("========= COMPUTE-SANITIZER\n") == Verdict(None, ())
