"""The child process of `test_kernel`: compiles the small kernels for GPUs that are not here; one JSON line."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from kvgather.lab._assembly_child import NoDriver, gpu_target


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_all(target: str) -> dict[str, int]:
    from triton.runtime.driver import driver

    from kvgather.batch.kernel import batch_kernel, window_kernel
    from kvgather.batch.refused_kernel import refuse_rows_kernel

    gpu = gpu_target(target)
    torch.version.cuda = "13.0" if gpu.backend == "cuda" else None
    driver.set_active(NoDriver(gpu))  # type: ignore[arg-type]
    offsets, sizes = empty(17), {}
    wide = [empty(17, dtype=torch.int64) for _ in range(2)]
    for dtype in (torch.int32, torch.int64):
        kernel = batch_kernel.warmup(
            empty(16, 64, dtype=dtype), offsets.to(dtype), offsets.to(dtype), empty(16, 64), offsets, offsets,
            empty(40, dtype=torch.int64), empty(16, 64, dtype=dtype), *wide, 16, 64, 500, 40, 9000, 5, 8000, 1,
            64, 1, 1, 1, PAGE=16, CHUNK=256, N=1024, grid=(1,),
        )  # fmt: skip
        sizes[f"{target} batch {dtype}"] = kernel.metadata.shared
    kernel = window_kernel.warmup(offsets, offsets, offsets, offsets, 16, 1, 128, 100, CHUNK=1024, grid=(1,))
    sizes[f"{target} window"] = kernel.metadata.shared
    for dtype in (torch.bfloat16, torch.float32):
        kernel = refuse_rows_kernel.warmup(
            empty(40, 64, 64, dtype=dtype), empty(40, 64, dtype=torch.float32), offsets, 1, (4096, 64, 1), (64, 1),
            HEADS=64, DIM=64, DIMS=64, R=64, grid=(1,),
        )  # fmt: skip
        sizes[f"{target} refuse {dtype}"] = kernel.metadata.shared
    return sizes


if __name__ == "__main__":
    found: dict[str, int] = {}
    for target in ("cuda:80", "cuda:90", "hip:gfx942"):
        found |= compile_all(target)
    print(json.dumps(found))
