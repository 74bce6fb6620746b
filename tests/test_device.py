"""Where kernels run: what is found out about this machine, and what is said where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvgather import device
from kvgather.device import BackendError, Report
from tests.where import interpreted

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
no_gpu = pytest.mark.skipif(device.has_gpu(), reason="about machines with no GPU")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a child that decides for itself where kernels run."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=120
    )


GATHER = """
pool = torch.ones(2, 4, 1, 8)
plan = kg.GatherPlan.build(torch.tensor([[1]]), torch.tensor([0, 3]), page_size=4, num_blocks=2)
print(kg.gather(pool, pool, plan, k_scale=2.0)[0].sum().item(), kg.device.interpreting())
try:
    print(kg.gather(pool, pool, plan, k_scale=2.0, backend="triton")[0].sum().item())
except ValueError as error:
    print(type(error).__name__, error)
"""


@no_gpu
@pytest.mark.triton
def test_importing_kvgather_first_switches_the_interpreter_on() -> None:
    done = run(f"import os, torch, kvgather as kg\n{GATHER}\nprint(os.environ['TRITON_INTERPRET'])")
    assert done.stdout.split("\n") == ["48.0 True", "48.0", "1", ""], done.stderr


@no_gpu
@pytest.mark.triton
def test_triton_before_kvgather_leaves_torch_and_says_what_to_do() -> None:
    done = run(f"import triton, torch, kvgather as kg\n{GATHER}\nprint(kg.device.doctor())")
    lines = done.stdout.split("\n")
    assert lines[0] == "48.0 False", done.stderr
    assert lines[1] == (
        'BackendError backend="triton" needs Triton\'s interpreter on a machine with no GPU, and triton was imported '
        "before it was switched on; import kvgather before triton, or set TRITON_INTERPRET=1 before Python starts"
    )
    assert "Triton kernels  not here: triton was imported before its interpreter was switched on" in lines
    assert "note: import kvgather before triton, or set TRITON_INTERPRET=1 before Python starts" in lines


@no_gpu
@pytest.mark.triton
def test_triton_before_kvgather_is_fine_with_the_variable_set() -> None:
    done = run(f"import triton, torch, kvgather as kg\n{GATHER}", TRITON_INTERPRET="1")
    assert done.stdout.split("\n")[:2] == ["48.0 True", "48.0"], done.stderr


@no_gpu
@pytest.mark.triton
def test_the_variable_set_to_0_is_left_alone() -> None:
    done = run(f"import torch, kvgather as kg\n{GATHER}", TRITON_INTERPRET="0")
    assert done.stdout.split("\n")[0] == "48.0 False", done.stderr
    assert "BackendError" in done.stdout


def test_without_triton_torch_runs_and_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "triton_available", lambda: False)
    assert not device.interpreting()
    with pytest.raises(
        BackendError, match=r'backend="triton" needs triton, which is not installed here; accepted: "to'
    ):
        device.require_triton(CPU)
    report = str(device.doctor())
    assert "Triton kernels  not here: triton is not installed" in report
    assert "note: the chapters that run Triton kernels" in report


@pytest.mark.triton
def test_tensors_on_a_cpu_while_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    device.require_triton(CUDA)
    with pytest.raises(
        BackendError, match=r'backend="triton" got tensors on cpu, and kernels are compiled for the GPU'
    ):
        device.require_triton(CPU)


@interpreted
@pytest.mark.triton
def test_the_interpreter_takes_any_device() -> None:
    assert device.interpreting()
    device.require_triton(CPU)


def test_in_the_interpreter_every_format_is_decoded_in_software() -> None:
    assert device.fp8_support("cpu") == dict.fromkeys(device.FP8_DTYPES, "software")


@pytest.mark.parametrize(
    ("capability", "hardware"), [((8, 0), 0), ((8, 6), 0), ((8, 9), 2), ((9, 0), 2), ((10, 0), 2), ((12, 0), 2)]
)
def test_what_nvidia_gpus_decode(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hardware: int) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    support = device.fp8_support("cuda")
    assert list(support.values()).count("hardware") == hardware
    assert support[torch.float8_e4m3fnuz] == "software"


@pytest.mark.parametrize(
    ("arch", "hardware"),
    [
        ("gfx90a:sramecc+:xnack-", set()),
        ("gfx942:sramecc+:xnack-", {torch.float8_e4m3fnuz}),
        ("gfx950", {torch.float8_e4m3fn, torch.float8_e5m2}),
        ("gfx1100", set()),
        ("gfx1201", {torch.float8_e4m3fn, torch.float8_e5m2}),
    ],
)
def test_what_amd_gpus_decode(monkeypatch: pytest.MonkeyPatch, arch: str, hardware: set[torch.dtype]) -> None:
    class Properties:
        gcnArchName = arch

    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: Properties)
    assert {dtype for dtype, how in device.fp8_support("cuda").items() if how == "hardware"} == hardware


def test_the_doctor_says_what_runs_here() -> None:
    report = device.doctor()
    assert list(report.rows) == ["python", "torch", "triton", "GPU", "Triton kernels", "FP8 decode", "notebooks"]
    assert report.rows["torch"] == torch.__version__
    assert all(report.rows.values())
    text = str(report)
    assert text.splitlines()[1] == f"{'torch':<14}  {torch.__version__}"
    assert "e4m3fn: " in text and "e4m3fnuz: " in text and "e5m2: " in text
    if not device.has_gpu():
        assert report.rows["GPU"] == "none"


def test_a_report_is_a_table_and_its_notes() -> None:
    assert str(Report({"a": "1", "long": "2"}, ("mind the gap",))) == "a     1\nlong  2\nnote: mind the gap"


def test_backend_errors_are_value_errors() -> None:
    assert issubclass(BackendError, ValueError)
