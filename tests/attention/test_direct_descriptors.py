"""The direct kernel for compute capability 9.0: its tensor cores read where its PTX says, whatever the head dims.

A set of launches that covers tiles, padded dims, pools and layouts; `descriptor_scan` draws as many as there is time
for. Why this needs a test: see `test_narrow_operands`.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention._direct_assembly_child import Job
from tests.attention.descriptors import disassembled, faults, tool, version_of
from tests.attention.ptx import promised
from tests.attention.test_direct_aot import compile_in_a_child

pytestmark = pytest.mark.triton

TWO_LOOPS = Job(
    "cuda:90", "NHD", ("per-page-head", "none"), torch.float8_e5m2, heads=(8, 1), dims=(48, 32), page_size=64, new=5,
    sequences=4,
)  # fmt: skip
JOBS = {
    TWO_LOOPS: (64, 128, 64, 64),
    Job(
        "cuda:90", "NHD", ("none", "per-token-head"), dims=(24, 8), heads=(3, 1), page_size=1, window=5, new=20,
        sequences=4,
    ): (64, 128, 64, 64),
    Job("cuda:90", "SHUFFLE", dims=(128, 32), new=8, state=True, q_dtype=torch.float16): (64, 128, 128, 64),
    Job("cuda:90", "HND", ("none", "none"), torch.bfloat16, dims=(16, 64), heads=(8, 8), new=200): (128, 128, 64, 64),
    Job("cuda:90", "SHUFFLE", dims=(32, 192), heads=(8, 8), new=200, window=128): (64, 64, 64, 256),
    Job(
        "cuda:90", "SHUFFLE", dims=(16, 16), dtype=torch.float8_e4m3fnuz, new=9, tile=(64, 16, 4, 2, 1),
    ): (64, 64, 64, 64),
    Job("cuda:90", "NHD", dims=(64, 32), new=1): (16, 64, 64, 32),
    Job("cuda:90", "NHD", ("none", "none"), torch.float32, dims=(32, 16), new=8): (64, 128, 32, 16),
}  # fmt: skip
"""Launches, and rows, keys, columns of K and columns of V that each program has at a time."""
UNGUARDED = replace(TWO_LOOPS, guarded=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, dict[str, Any]]:
    return compile_in_a_child([*JOBS, UNGUARDED], tmp_path_factory.mktemp("triton"))


def found(answer: dict[str, Any], folder: Path) -> list[str]:
    """What the machine code of one compiled launch addresses otherwise than its PTX."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(base64.b64decode(answer["cubin"]))
    return faults(answer["text"], disassembled(cubin, tool("nvdisasm")))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_tensor_cores_read_where_the_ptx_says(compiled: dict[Job, dict[str, Any]], job: Job, tmp_path: Path) -> None:
    answer = compiled[job]
    assert "error" not in answer, answer["error"]
    m, n, k_pad, v_pad = (answer["constants"][name] for name in ("M", "N", "K_COLUMNS", "V_COLUMNS"))
    assert (m, n, k_pad, v_pad) == JOBS[job]
    uppers = {one[2] for multiply in promised(answer["text"]) for one in multiply.descriptors if one}
    described = m >= 64 and job.dtype.itemsize < 4
    assert uppers == ({0x40000040} if described else set()), "rows of 128 bytes, and all operands stored in one way"
    assert found(answer, tmp_path) == []


def test_without_the_guard_it_reads_elsewhere(compiled: dict[Job, dict[str, Any]], tmp_path: Path) -> None:
    """What an H100 was seen to do: "Invalid __shared__ read", or wrong values."""
    answer = compiled[UNGUARDED]
    assert (answer["constants"]["K_COLUMNS"], answer["constants"]["V_COLUMNS"]) == (64, 32)
    if version_of(tool("ptxas")) >= (12, 9):
        pytest.skip(f"ptxas {version_of(tool('ptxas'))} is right here; 12.8 is wrong")
    assert [line for line in found(answer, tmp_path) if "64x32x16 transposed: unknown" in line]
