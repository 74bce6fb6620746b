"""Compiles the forms of the Hopper kernel for compute capability 9.0; prints what ptxas says of each, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kvgather.hopper import plan
from kvgather.hopper.kernel import hopper_kernel

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
POINTERS = ("bf16", "i32", "i32", "i32", "fp32", "bf16", "fp32", "i32", "fp32", "i32", "fp32")
TYPES = (*(f"*{kind}" for kind in POINTERS), "fp32", *("i32",) * 5, ("i32",) * 2, ("i32",) * 3, ("i32",) * 3)


def said_of(form: plan.Form, layer: plan.LayerForm) -> dict[str, object]:
    """Compile a form for a layer, and return the bytes it spills and has of shared memory, and ptxas's warnings."""
    types = dict(zip(hopper_kernel.arg_names, (*TYPES, "constexpr", "constexpr"), strict=True))
    multiples = {(i,): [["tt.divisibility", 16]] for i in range(len(POINTERS))}
    source = GluonASTSource(hopper_kernel, types, constexprs={"LAYER": layer, "FORM": form}, attrs=multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [str(PTXAS), "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill stores", told)]
    # C7510 and C7512: ptxas serializes wgmma.
    return {"spilled": max(spills), "shared": compiled.metadata.shared, "warnings": re.findall(r"C75\d\d", told)}


if __name__ == "__main__":
    for name, dim, heads, group, sinks in (
        ("FEW", 64, 8, 8, False),
        ("FEW", 128, 8, 4, True),
        ("MANY", 64, 2, 3, True),
        ("MANY", 128, 8, 4, True),
    ):
        layer = plan.LayerForm(dim, 16, heads, group, k_scaled=True, v_scaled=sinks, sinks=sinks)
        print(json.dumps({"form": f"{name} {dim}", **said_of(getattr(plan, name)[dim], layer)}), flush=True)
