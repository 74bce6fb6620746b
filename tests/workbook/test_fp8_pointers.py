"""Kernels with pointers to e4m3fn run in the interpreter for GPUs whose compiler refuses them, and only for those."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvgather import interpreter
from kvgather.device import interpreting
from kvgather.workbook.fp8_pointers import interpreted_if_refused


@pytest.mark.triton
@pytest.mark.parametrize(
    ("device", "capability", "hip", "interpreted"),
    [
        ("cuda", (7, 5), None, True),
        ("cuda:0", (8, 0), None, True),
        ("cuda", (8, 6), None, True),
        ("cuda", (8, 9), None, False),
        ("cuda", (9, 0), None, False),
        ("cuda", (9, 4), "7.0", False),
        ("cpu", (8, 0), None, False),
    ],
)
def test_where_it_interprets(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], hip: str | None, interpreted: bool
) -> None:
    monkeypatch.setattr(interpreter, "_library_interpreted", False)  # as in a process that compiles kernels
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    with interpreted_if_refused(device):
        assert interpreting() is interpreted
    assert not interpreting()


COMPILED = """
import pathlib, sys, torch
torch.cuda.is_available = lambda: True  # kernels are decorated for compilation
import triton, triton.language as tl
from kvgather.workbook.fp8_pointers import interpreted_if_refused
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def widen_kernel(codes_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out_ptr + lanes, tl.load(codes_ptr + lanes).to(tl.float32))

codes, out = torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn), torch.zeros(2)
signature = {"codes_ptr": "*fp8e4nv", "out_ptr": "*fp32", "N": "constexpr"}
for capability in (80, 86, 89, 90):
    torch.cuda.get_device_capability = lambda where: divmod(capability, 10)
    try:
        triton.compile(ASTSource(widen_kernel, signature, {"N": 2}), target=GPUTarget("cuda", capability, 32))
        print(capability, type(widen_kernel).__name__, "compiles")
    except Exception as error:
        with interpreted_if_refused("cuda"):
            widen_kernel[(1,)](codes, out, N=2)
        print(capability, type(error).__name__, out.tolist())
        out.zero_()
"""


@pytest.mark.triton
def test_it_interprets_what_triton_refuses_to_compile(tmp_path: Path) -> None:
    """Compiled ahead of time for four GPUs, in a process whose kernels are compiled."""
    script = tmp_path / "widen.py"  # triton.jit needs a file
    script.write_text(COMPILED)
    environment = {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "80 CompilationError [1.0, -448.0]",
        "86 CompilationError [1.0, -448.0]",
        "89 JITFunction compiles",
        "90 JITFunction compiles",
    ], done.stderr
