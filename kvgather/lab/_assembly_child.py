"""The child process of `assembly`: compiles the gather kernel and prints one JSON object for each job.

A compilation uses the same inputs as a launch: the tile, the constants and the strides come from `GatherLaunch`, the
argument types from Triton's specialization of meta tensors.
"""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ..cases import Case, empty_pools
from ..device import fp8_in_hardware
from ..formats.fp8 import FORMATS, Fp8Format
from ..formats.layout import Which
from ..formats.scale import Scale, kind_shape
from ..gather.kernel import GatherLaunch, Side, gather_kernel, pointers_of
from ..gather.tile import TiledPool
from ..kernels.pages import PageSearch
from .assembly import ERROR_LENGTH, Variant

META = torch.device("meta")


class NoDriver:
    """The part of a Triton driver that a compilation calls, for a GPU that this machine does not have."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton caches kernels by device, and each target needs its own kernels

    def get_current_stream(self, device: object) -> int:
        return 0


def gpu_target(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def pools_of(variant: Variant) -> tuple[Tensor, Tensor]:
    key, value = empty_pools(variant.case, variant.case.num_blocks, META)
    if variant.heads_outermost:
        heads = 2 if variant.case.layout == "NHD" else 1
        key, value = (
            torch.empty_like(pool.movedim(heads, 0), memory_format=torch.contiguous_format).movedim(0, heads)
            for pool in (key, value)
        )
    return key, value


def side_of(case: Case, which: Which, pool: Tensor) -> Side:
    kind, dim = (case.k_kind, case.k_dim) if which == "key" else (case.v_kind, case.v_dim)
    scale = None
    if kind != "none":
        scale = torch.empty(kind_shape(kind, case.num_blocks, case.num_heads, case.page_size) or (1,), device=META)
    rows = torch.empty((case.total_tokens, case.num_heads, dim), dtype=case.out_dtype, device=META)
    return Side(which, pool, Scale.of(kind, scale), rows)


def warm_up(launch: GatherLaunch, k: Side, v: Side, page: Tensor, hardware: bool) -> Any:
    """The compiled kernel of a launch.

    Args:
        page: records, or a block table.
        hardware: whether the target decodes the pool's format: the only constant that a launch reads from its device.
    """
    pairs = zip(pointers_of(k, v), (*k.views, *v.views), strict=True)
    pointers = [p if view is None else p.view(view) for p, view in pairs]  # type: ignore[union-attr]
    constants = launch.constants | {"HARDWARE": hardware}
    numbers = (7, 1024, 1024, 1024, 1024, 3)  # run-time numbers, for which Triton does not specialize
    return gather_kernel.warmup(page, page, page, *pointers, *numbers, *launch.strides, **constants, grid=(1,))


def compile_one(variant: Variant, target: str) -> dict[str, Any]:
    case, gpu = variant.case, gpu_target(target)
    key, value = pools_of(variant)
    k, v = side_of(case, "key", key), side_of(case, "value", value)
    indices = torch.empty(len(case.lengths) + 1, dtype=torch.int32, device=META)
    offsets = (indices, indices[1:] if case.starts else None) if variant.by_table else None
    launch = GatherLaunch(
        k, v, case.layout, interpreted=False, lanes=gpu.warp_size, offsets=offsets, zero_bad_v=variant.for_attention
    )
    hardware = case.dtype not in FORMATS or case.dtype in fp8_in_hardware(*target.split(":"))
    page = torch.empty((case.total_tokens // case.page_size + 1, 4), dtype=torch.int32, device=META)
    driver.set_active(NoDriver(gpu))  # type: ignore[arg-type]
    try:
        kernel = warm_up(launch, k, v, page, hardware)
    except Exception as error:
        return {"error": words_of(error)}
    text = kernel.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    return {"text": text, "lanes": gpu.warp_size, "constants": plain(launch.constants | {"HARDWARE": hardware})}


def plain(constants: dict[str, Any]) -> dict[str, Any]:
    """A kernel's constants for JSON, by name: a format is its name, and "" for floats.

    Each field of a pool's form is a constant, such as K_ALIGN; so are those of a page search, which a planned gather
    does not have.
    """
    flat: dict[str, Any] = {"PLANNED": constants["PAGES"] is None}
    for name, value in constants.items():
        if isinstance(value, TiledPool):
            flat |= {f"{name}_{field.upper()}": part for field, part in vars(value).items()}
            flat[f"{name}_UNIT"] = value.unit
        elif isinstance(value, PageSearch):
            flat |= {"STARTS": value.starts, "LANES": value.lanes}
        elif isinstance(value, Fp8Format):
            flat[name] = value.name
        elif value is not None:
            flat[name] = value
    return {"CODE": ""} | flat


def words_of(error: BaseException) -> str:
    """Type and message of the first exception in a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip()[:ERROR_LENGTH]


if __name__ == "__main__":
    for job in pickle.load(sys.stdin.buffer):
        print(json.dumps(compile_one(*job)), flush=True)
