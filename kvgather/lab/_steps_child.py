"""The child process of `warps`: compiles the kernels of chapter 07 and prints one JSON object for each job."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

from ..cases import Case
from ..device import fp8_in_hardware
from ..gather.kernel import GatherLaunch
from ._assembly_child import META, NoDriver, gpu_target, pools_of, side_of, warm_up, words_of
from .assembly import Variant
from .before_fix import gather_one_head_kernel
from .steps import STEPS, constants_of


def _warm_up(name: str, case: Case, target: str) -> tuple[Any, int]:
    """One compiled kernel and its number of warps; its arguments have the types of a launch for the case."""
    key, value = pools_of(Variant(case))
    scale = torch.empty(1, device=META)
    rows = torch.empty(case.total_tokens, case.num_heads, case.k_dim, dtype=case.out_dtype, device=META)
    records = torch.empty(case.total_tokens // case.page_size + 1, 4, dtype=torch.int32, device=META)
    if "\n" in name:
        codes = torch.empty(case.page_size * case.num_heads * case.k_dim, dtype=torch.uint8, device=META)
        shape = {"HEADS": case.num_heads, "PAGE": case.page_size, "DIM": case.k_dim}
        return _kernel_in(name).warmup(codes, key.view(torch.uint8), 1, **shape, num_warps=16, grid=(1,)), 16
    hardware = case.dtype in fp8_in_hardware(*target.split(":"))
    if name.startswith("0"):
        index = torch.empty(64, dtype=torch.int32, device=META)
        kernel = gather_one_head_kernel.warmup(
            key, value, rows, rows, index, scale, scale, index, index, index, case.num_heads, 1024,
            PAGE_SIZE=case.page_size, K_DIM=case.k_dim, V_DIM=case.v_dim, K_LANES=case.k_dim, V_LANES=case.v_dim,
            X=16 // case.dtype.itemsize, SHUFFLE=case.layout == "SHUFFLE", DEQUANT=True, PER_TOKEN=False, grid=(1,),
        )  # fmt: skip
        return kernel, 4
    if name.startswith("5"):
        k, v = side_of(case, "key", key), side_of(case, "value", value)
        launch = GatherLaunch(k, v, case.layout, interpreted=False, lanes=gpu_target(target).warp_size)
        return warm_up(launch, k, v, records, hardware), launch.constants["num_warps"]
    step = next(step for step in STEPS if step.name == name)
    num_warps = step.num_warps(case.page_size, case.num_heads, case.k_dim, gpu_target(target).warp_size)
    constants = constants_of(case.layout, case.dtype, case.page_size, case.num_heads, case.k_dim, hardware)
    pools = (key.view(torch.uint8), value.view(torch.uint8))
    kernel = step.kernel.warmup(records, *pools, scale, scale, rows, rows, **constants, num_warps=num_warps, grid=(1,))
    return kernel, num_warps


def _kernel_in(source: str) -> Any:
    """The kernel that a source text defines, imported from a file because Triton reads a kernel's source from one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel_of_a_reader.py"
        path.write_text(f"import triton\nimport triton.language as tl\n\n\n{source}\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return next(value for value in vars(module).values() if isinstance(value, triton.JITFunction))


def compile_one(name: str, case: Case, target: str) -> dict[str, Any]:
    gpu = gpu_target(target)
    driver.set_active(NoDriver(gpu))  # type: ignore[arg-type]
    try:
        kernel, num_warps = _warm_up(name, case, target)
    except Exception as error:
        return {"error": words_of(error)}
    text = kernel.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    return {"text": text, "layouts": kernel.asm["ttgir"], "lanes": gpu.warp_size, "num_warps": num_warps}


if __name__ == "__main__":
    for job in pickle.load(sys.stdin.buffer):
        print(json.dumps(compile_one(*job)), flush=True)
