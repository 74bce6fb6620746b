"""The direct kernel compiles for GPUs that are not here, fits into their shared memory, and reads pages widely."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvgather.device import fp8_in_hardware
from kvgather.lab.assembly import width, widths
from kvgather.lab.child import environment
from tests.attention._direct_assembly_child import Job

pytestmark = pytest.mark.triton

PER_TOKEN = ("per-token-head", "per-token-head")
JOBS = (
    Job("cuda:80", "SHUFFLE", PER_TOKEN, new=1, state=True),
    Job("cuda:90", new=1, sequences=1, sinks=False),
    Job("cuda:90", "SHUFFLE", ("none", "none"), torch.bfloat16, new=1),
    Job("cuda:100", dims=(192, 128), window=128, new=1),
    Job("hip:gfx942", new=1, num_blocks=2**19),
    Job("hip:gfx942", "SHUFFLE", PER_TOKEN, torch.float8_e4m3fnuz, new=1, window=128),
    Job("hip:gfx950", state=True, new=128),
)
SHARED = {"cuda:80": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536, "hip:gfx950": 163_840}
"""Bytes that one program may have."""


def compile_in_a_child(jobs: Sequence[Job], folder: Path, timeout: float = 600) -> dict[Job, dict[str, Any]]:
    """What the launcher compiles for each of `jobs`; `folder` keeps Triton's cache."""
    env = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    child = subprocess.run(
        [sys.executable, "-P", "-m", "tests.attention._direct_assembly_child"],
        input=pickle.dumps(list(jobs)), env=env, capture_output=True, timeout=timeout,
    )  # fmt: skip
    answers = [json.loads(line) for line in child.stdout.splitlines() if line.startswith(b"{")]
    assert len(answers) == len(jobs), child.stderr.decode(errors="replace")[-2000:]
    return dict(zip(jobs, answers, strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, dict[str, Any]]:
    return compile_in_a_child(JOBS, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_it_compiles_and_fits(compiled: dict[Job, dict[str, Any]], job: Job) -> None:
    made = compiled[job]
    assert "error" not in made, made["error"]
    constants = made["constants"]
    in_hardware = job.dtype.itemsize > 1 or job.dtype in fp8_in_hardware(*job.target.split(":"))
    assert constants["HARDWARE"] is in_hardware and constants["INTERPRETED"] is False
    assert 0 < made["shared"] <= SHARED[job.target]
    assert job.target.startswith("cuda") or "maxnreg" not in constants
    if job.target.startswith("cuda") and job.dtype == torch.float8_e4m3fn:
        assert ("e4m3x2" in made["text"]) is in_hardware


def copied(ptx: str) -> set[int]:
    """Bytes that a thread fetches with each instruction that brings pages to shared memory."""
    return {
        int(size, 16) for size in re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+)", ptx)
    }


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_pages_are_read_16_bytes_a_thread(compiled: dict[Job, dict[str, Any]], job: Job) -> None:
    text = compiled[job]["text"]
    if job.target.startswith("cuda"):
        assert 16 in copied(text)
        assert {width(name) for name in widths(text) if name.startswith("ld.")} <= {4, 16}
    else:
        assert 16 in {width(name) for name in widths(text) if "_load_" in name}
