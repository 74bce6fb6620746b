"""The choice between GPU and interpreter, device arguments, FP8 support and `doctor`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvgather import device, interpreter
from kvgather.device import BackendError, Report
from tests.where import interpreted

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
no_gpu = pytest.mark.skipif(device.has_gpu(), reason="about machines with no GPU")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a child that does not inherit TRITON_INTERPRET."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, timeout=120
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
def test_importing_kvgather_first_enables_the_interpreter() -> None:
    done = run(f"import torch, kvgather as kg\n{GATHER}")
    assert done.stdout.split("\n") == ["48.0 True", "48.0", ""], done.stderr


DECORATED_LATER = """
import os, subprocess, sys, tempfile, importlib.util, pathlib
import torch, kvgather as kg
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "own.py"
    path.write_text(
        "import triton, triton.language as tl\\n@triton.jit\\n"
        "def double(x, N: tl.constexpr):\\n    i = tl.arange(0, N)\\n    tl.store(x + i, tl.load(x + i) * 2)\\n"
    )
    spec = importlib.util.spec_from_file_location("own", path)
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    x = torch.ones(8)
    own.double[(1,)](x, 8)
print(x.sum().item(), "TRITON_INTERPRET" in os.environ)
child = "import triton.language as tl, triton; print(isinstance(tl.cdiv, triton.JITFunction))"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip())
"""


@no_gpu
@pytest.mark.triton
def test_the_interpreter_runs_later_kernels_and_is_not_inherited() -> None:
    done = run(DECORATED_LATER)
    assert done.stdout.split("\n") == ["16.0 False", "True", ""], done.stderr


@no_gpu
@pytest.mark.triton
def test_a_variable_that_the_user_set_is_inherited() -> None:
    done = run("import os, kvgather; print(os.environ['TRITON_INTERPRET'])", TRITON_INTERPRET="1")
    assert done.stdout == "1\n", done.stderr


@no_gpu
@pytest.mark.triton
def test_triton_imported_first_leaves_torch_and_the_error_gives_the_fix() -> None:
    done = run(f"import triton, torch, kvgather as kg\n{GATHER}\nprint(kg.device.doctor())")
    lines = done.stdout.split("\n")
    assert lines[0] == "48.0 False", done.stderr
    assert lines[1] == (
        'BackendError backend="triton" needs Triton\'s interpreter on a machine with no GPU, and triton was imported '
        'before its interpreter was switched on; accepted: "torch" or "auto", or import kvgather before triton, or set '
        "TRITON_INTERPRET=1 before Python starts"
    )
    assert "Triton kernels  not here: triton was imported before its interpreter was switched on" in lines
    assert "note: import kvgather before triton, or set TRITON_INTERPRET=1 before Python starts" in lines


@no_gpu
@pytest.mark.triton
def test_triton_imported_first_works_with_the_variable_set() -> None:
    done = run(f"import triton, torch, kvgather as kg\n{GATHER}", TRITON_INTERPRET="1")
    assert done.stdout.split("\n")[:2] == ["48.0 True", "48.0"], done.stderr


@no_gpu
@pytest.mark.triton
def test_the_variable_set_to_0_disables_the_interpreter() -> None:
    done = run(f"import torch, kvgather as kg\n{GATHER}", TRITON_INTERPRET="0")
    assert done.stdout.split("\n")[0] == "48.0 False", done.stderr
    assert "BackendError" in done.stdout
    assert "and TRITON_INTERPRET is '0'; accepted: " in done.stdout
    assert "or unset TRITON_INTERPRET, or set it to 1, before Python starts" in done.stdout


@no_gpu
@pytest.mark.triton
def test_the_error_names_a_knob_that_was_disabled() -> None:
    done = run(f"import torch, kvgather as kg, triton\ntriton.knobs.runtime.interpret = False\n{GATHER}")
    assert "and triton.knobs.runtime.interpret was set to False; accepted: " in done.stdout, done.stderr


HIDDEN = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "numpy" else find(name, package)
sys.modules["numpy"] = None
"""


@no_gpu
@pytest.mark.triton
@pytest.mark.filterwarnings("ignore")
def test_the_error_names_a_missing_numpy_for_each_value_of_the_variable() -> None:
    for environment in ({}, {"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}):
        done = run(f"{HIDDEN}\nimport torch, kvgather as kg\n{GATHER}\nprint(kg.device.doctor())", **environment)
        assert done.stdout.startswith("48.0 False\nBackendError"), done.stderr
        assert "the interpreter needs NumPy, which is not installed; accepted: " in done.stdout
        assert "Triton kernels  not here: the interpreter needs NumPy, which is not installed" in done.stdout
        assert done.stdout.rstrip().endswith("note: install NumPy")


@no_gpu
def test_a_failed_import_of_triton_leaves_torch_and_is_reported(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('GLIBC_9.9 not found')\n", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport os, torch, kvgather as kg\n{GATHER}"
    done = run(f"{code}\nprint('TRITON_INTERPRET' in os.environ)\nprint(kg.device.doctor())")
    lines = done.stdout.split("\n")
    assert lines[0] == "48.0 False", done.stderr
    assert lines[1] == (
        'BackendError backend="triton" needs triton, which cannot be imported here (ImportError: GLIBC_9.9 not found); '
        'accepted: "torch" or "auto"'
    )
    assert lines[2] == "False"
    assert "Triton kernels  not here: ImportError: GLIBC_9.9 not found" in lines


def test_the_error_names_the_callers_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "triton_available", lambda: False)
    with pytest.raises(BackendError, match=r'path="direct" needs triton, .*; accepted: "gather" or "auto"$'):
        device.require_triton(CPU, 'path="direct"', '"gather" or "auto"')


def test_without_triton_the_triton_backend_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device, interpreter):
        monkeypatch.setattr(module, "triton_available", lambda: False)
    assert not device.interpreting()
    with pytest.raises(
        BackendError, match=r'backend="triton" needs triton, which is not installed here; accepted: "to'
    ):
        device.require_triton(CPU)
    report = str(device.doctor())
    assert "Triton kernels  not here: triton is not installed" in report
    assert "note: the chapters that run Triton kernels" in report


@pytest.mark.triton
def test_cpu_tensors_are_rejected_while_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    monkeypatch.setattr(interpreter, "has_gpu", lambda: True)
    device.require_triton(CUDA)
    with pytest.raises(
        BackendError, match=r'backend="triton" got tensors on cpu, and kernels are compiled for the GPU'
    ):
        device.require_triton(CPU)


@interpreted
@pytest.mark.triton
def test_the_interpreter_accepts_cpu_tensors() -> None:
    assert device.interpreting()
    device.require_triton(CPU)


def test_every_format_is_decoded_in_software_on_a_cpu() -> None:
    assert device.fp8_support("cpu") == dict.fromkeys(device.FP8_DTYPES, "software")


BAD_DEVICES = [
    (3.5, TypeError, r"device is float 3.5; accepted: a torch.device or its name: cpu, cuda, cuda:0, …"),
    (0, TypeError, r"device is int 0; accepted: a torch.device or its name"),
    ([], TypeError, r"device is list \[\]; accepted: "),
    ("gpu", ValueError, r"device is 'gpu'; accepted: a torch.device or its name"),
    ("", ValueError, r"device is ''; accepted: "),
    ("cuda:-1", ValueError, r"device is 'cuda:-1'; accepted: "),
    pytest.param(10**5000, TypeError, r"device is int of too many digits to print; accepted: ", id="huge"),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD_DEVICES)
def test_an_invalid_device_is_rejected(value: object, error: type[Exception], message: str) -> None:
    for call in (device.fp8_support, device.resolve_device):
        with pytest.raises(error, match=message):
            call(value)


def test_a_device_that_this_machine_lacks_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    count = torch.cuda.device_count() if device.has_gpu() else 0
    with pytest.raises(ValueError, match=rf"where is cuda:99, and torch sees {count} GPUs here; accepted: one of thos"):
        device.resolve_device("cuda:99", "where")
    with pytest.raises(ValueError, match="device is meta, which holds no values; accepted: a GPU, or cpu"):
        device.resolve_device("meta")
    with pytest.raises(ValueError, match="device is maia, which torch cannot use here"):
        device.resolve_device("maia")
    monkeypatch.setattr(device, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="device is cuda:99; accepted: a GPU that torch sees here, or cpu"):
        device.fp8_support("cuda:99")


def test_resolve_device() -> None:
    assert device.resolve_device().type == ("cuda" if device.has_gpu() else "cpu")
    assert device.resolve_device("cpu") == device.resolve_device(CPU) == CPU


@pytest.mark.parametrize(
    ("capability", "hardware"), [((8, 0), 0), ((8, 6), 0), ((8, 9), 2), ((9, 0), 2), ((10, 0), 2), ((12, 0), 2)]
)
def test_fp8_support_of_nvidia(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hardware: int) -> None:
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
def test_fp8_support_of_amd(monkeypatch: pytest.MonkeyPatch, arch: str, hardware: set[torch.dtype]) -> None:
    class Properties:
        gcnArchName = arch

    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: Properties)
    assert {dtype for dtype, how in device.fp8_support("cuda").items() if how == "hardware"} == hardware


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("rocm", "gfx942"), ValueError, "backend is 'rocm'; accepted: cuda, hip"),
        ((None, "90"), TypeError, "backend is NoneType; accepted: a string"),
        (("cuda", 90), TypeError, "arch is int; accepted: a string"),
        (("cuda", "9.0"), ValueError, "arch is '9.0'; accepted for cuda: a compute capability without its dot"),
        (("cuda", "sm_90"), ValueError, "arch is 'sm_90'; accepted for cuda"),
    ],
)
def test_what_is_no_architecture(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        device.fp8_in_hardware(*arguments)


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


def test_the_text_of_a_report_is_a_table_and_notes() -> None:
    assert str(Report({"a": "1", "long": "2"}, ("mind the gap",))) == "a     1\nlong  2\nnote: mind the gap"


def test_backend_errors_are_value_errors() -> None:
    assert issubclass(BackendError, ValueError)
