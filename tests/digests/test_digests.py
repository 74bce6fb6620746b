"""Public calls give the recorded bits, kernels take the recorded resources, and the records see what changes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.digests import record
from tests.digests.cases import CASES, FLOATS, FP8, KINDS, LAYOUTS, Attend, Copy
from tests.digests.digest import EVERYWHERE, digest, machine
from tests.digests.resources import CUDA, HIP, numbers_of
from tests.where import interpreted

HERE = Path(__file__).resolve().parent
HANDFUL = "x64-page16-e4m3fn>bfloat16-per-token-head-1seqs145652"
"""A gather of each layout for an H100, one of them by table, and one for an MI300."""


def compare(tool: str, file: str, *more: str) -> str:
    """What a tool says of a record; the test is skipped where the record is not of this machine, and fails if any
    value differs."""
    command = [sys.executable, f"tools/{tool}.py", "--compare", str(HERE / file), *more]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=600)
    if done.returncode == 2:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.triton
@interpreted
def test_the_interpreter_and_torch_give_the_recorded_bits() -> None:
    assert "0 differ, 0 are not recorded" in compare("digests", "interpreter.json")


@pytest.mark.gpu
@pytest.mark.triton
def test_the_gpu_gives_the_recorded_bits() -> None:
    if machine() not in (recorded := record.read(HERE / "gpu.json")):
        pytest.skip(f"here is {machine()}; recorded: {'; '.join(recorded) or 'nothing'}")
    compare("digests", "gpu.json")


@pytest.mark.triton
def test_a_handful_of_kernels_takes_what_was_recorded() -> None:
    assert "6 are equal, 0 differ, 0 are not" in compare("resources", "resources.json", "--only", HANDFUL)


def test_both_backends_give_the_recorded_bits() -> None:
    found = record.read(HERE / "interpreter.json")[EVERYWHERE]
    names = [name.removesuffix("triton") for name in found if name.endswith((" gather triton", " write triton"))]
    assert len(names) > 80 and [name for name in names if found[f"{name}triton"] != found[f"{name}torch"]] == []


def test_any_two_values_meet() -> None:
    for kind in (Copy, Attend):
        pools = [case for case in CASES.values() if isinstance(case, kind)]
        met = {pair for p in pools for pair in product((p.layout, p.dtype, p.k_kind, p.page), repeat=2)}
        dtypes = (*FP8, *FLOATS)
        for some, others in ((LAYOUTS, dtypes), (LAYOUTS, KINDS), (dtypes, KINDS), (dtypes, (1, 16, 64))):
            assert met >= set(product(some, others))
        assert {(p.k_kind, p.v_kind) for p in pools} == set(product(KINDS, repeat=2))
    assert all(sum(c.large for c in CASES.values() if getattr(c, "layout", "") == name) for name in LAYOUTS)


def test_a_digest_sees_every_bit_but_those_of_nan() -> None:
    zeros = torch.zeros(4)
    other = [-zeros, zeros.half(), zeros.view(2, 2), zeros.int(), zeros + 1e-45, zeros[:3], zeros * torch.nan]
    assert len({digest([tensor]) for tensor in (zeros, *other)}) == 1 + len(other)
    assert digest([zeros, None]) != digest([None, zeros])
    for dtype in (*FP8, torch.bfloat16, torch.float16):
        bits = torch.arange(256).to(torch.uint8) if dtype.itemsize == 1 else torch.arange(-(2**15), 2**15, 32).short()
        values = torch.cat((bits, bits[-1:] + 1 - dtype.itemsize)).view(dtype)
        nan = values.isnan() if dtype.itemsize > 1 else values.float().isnan()
        assert nan.any() and len({digest([value]) for value in values[nan].split(1)}) == 1
        others = bits.view(dtype)[~nan[:-1]].split(1)
        assert len({digest([value]) for value in (*others, values[nan][:1])}) == len(others) + 1


def test_numbers_are_read_from_what_the_compilers_say() -> None:
    ptxas = (
        "    16 bytes stack frame, 40 bytes spill stores, 32 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size\n"
    )
    amd = (
        "    .agpr_count:     60\n    .private_segment_fixed_size: 8\n    .sgpr_count:     106\n"
        "    .sgpr_spill_count: 164\n    .vgpr_count:     316\n    .vgpr_spill_count: 2\n"
    )
    assert list(numbers_of(CUDA, ptxas, 7).values()) == [255, 16, 40, 32, 7]
    assert list(numbers_of(HIP, amd, 7).values()) == [316, 60, 106, 2, 164, 8, 7]
    for target, text in ((CUDA, ptxas * 2), (CUDA, ""), (HIP, ptxas)):
        with pytest.raises(ValueError, match=r"is given \d times; accepted: once"):
            numbers_of(target, text, 7)


def test_a_difference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"

    def run(found: record.Values, only: str = "", **task: Path) -> int:
        options = argparse.Namespace(**({"write": None, "compare": None} | task), only=only)
        return record.missing(options, "here") or record.finish(options, "here", found)

    assert run({}, compare=file) == 2 and "recorded: nothing" in capsys.readouterr().out
    file.write_text('{"there": {"same": "0"}}')
    assert run({}, compare=file) == 2 and "recorded: there" in capsys.readouterr().out
    assert run({"same": 1, "other": 2, "gone": 3}, write=file) == run({"new": 4}, "new", write=file) == 0
    assert json.loads(file.read_text())["there"] and len(record.read(file)["here"]) == 4
    assert run(record.read(file)["here"], compare=file) == 0 and run({"same": 1, "more": 5}, "sam", compare=file) == 0
    capsys.readouterr()
    assert run({"same": 1, "other": 9, "new": 4, "more": 5}, compare=file) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == ["DIFFERS gone: 3, now not there", "DIFFERS other: 2, now 9", "NOT RECORDED more",
                    "2 are equal, 2 differ, 1 are not recorded"]  # fmt: skip
