"""The child process of `test_direct_aot`: compiles the direct kernel for GPUs that are not here, one JSON line a job.

It calls the launcher itself, with tensors that have shapes and no memory, and takes what the launcher would launch.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")
OWN: dict[str, Any] = {}
"""What the module has before the first job replaces it."""


@dataclass(frozen=True)
class Job:
    """One launch of the direct kernel.

    Attributes:
        target: such as "cuda:90".
        kinds: of K's scale and of V's.
        heads: query heads, KV heads.
        dims: of K, of V.
        tile: rows, keys, warps, stages, splits; None: what the launcher chooses for the batch.
        new: new tokens of each of `sequences` sequences.
        num_blocks: the pool's size, which decides how AMD GPUs address it.
        guarded: false leaves out `alike_operands`, to see what it is for.
    """

    target: str
    layout: str = "NHD"
    kinds: tuple[str, str] = ("per-tensor", "per-tensor")
    dtype: torch.dtype = torch.float8_e4m3fn
    q_dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (64, 8)
    dims: tuple[int, int] = (64, 64)
    page_size: int = 16
    tile: tuple[int, int, int, int, int] | None = None
    window: int | None = None
    state: bool = False
    sinks: bool = True
    new: int = 16
    sequences: int = 16
    num_blocks: int = 512
    guarded: bool = True

    def __str__(self) -> str:
        parts = [self.target.replace(":", ""), self.layout, *dict.fromkeys(self.kinds), str(self.dtype).split(".")[1]]
        parts += [f"{self.heads[0]}/{self.heads[1]}x{self.dims[0]}:{self.dims[1]}", f"page{self.page_size}"]
        parts += [f"window{self.window}"] if self.window else []
        parts += ["state"] if self.state else []
        return "-".join([*parts, f"{self.sequences}x{self.new}"])


class Captured:
    """Stands for a kernel where it is launched: compiles it for the driver's target, and keeps what came of it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arg_names = kernel.arg_names
        self.compiled: Any = None
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.constants = constants
            self.compiled = self.kernel.warmup(*arguments, grid=(1,), **constants)

        return launch


def compile_one(job: Job) -> dict[str, Any]:
    from triton import next_power_of_2
    from triton.runtime.driver import driver

    import kvgather.attention.direct as direct
    import kvgather.kernels.launch as launch
    from kvgather.device import fp8_in_hardware
    from kvgather.formats.layout import Geometry, key_shape, value_shape
    from kvgather.formats.scale import Scale, kind_shape
    from kvgather.lab._assembly_child import NoDriver, gpu_target, words_of

    if not OWN:
        OWN.update({name: getattr(direct, name) for name in ("alike_operands", "combine_kernel", "direct_kernel")})
    gpu = gpu_target(job.target)
    in_hardware = fp8_in_hardware(*job.target.split(":"))
    captured = Captured(OWN["direct_kernel"])
    changes: dict[str, Any] = {
        "fp8_support": lambda _: {job.dtype: "hardware" if job.dtype in in_hardware else "software"},
        "direct_kernel": captured,
        "combine_kernel": Captured(OWN["combine_kernel"]),
        "multiplies_from_shared_memory": lambda _: gpu.backend == "cuda" and gpu.arch >= 90,
        "alike_operands": OWN["alike_operands"] if job.guarded else lambda *same: same,
    }
    for name, value in changes.items():
        setattr(direct, name, value)
    launch.launching = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    launch._RUNS_COMPILED = False
    launch._PREPARED.clear()
    torch.version.cuda = "13.0" if gpu.backend == "cuda" else None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def scale(kind: str) -> Scale:
        if kind == "none":
            return Scale.of(kind, None)
        return Scale.of(kind, empty(*(kind_shape(kind, job.num_blocks, job.heads[1], job.page_size) or (1,))))

    size = (job.num_blocks, job.page_size, job.heads[1])
    key = empty(*key_shape(job.layout, *size, job.dims[0], job.dtype.itemsize), dtype=job.dtype)
    value = empty(*value_shape(job.layout, *size, job.dims[1], job.dtype.itemsize), dtype=job.dtype)
    scales = scale(job.kinds[0]), scale(job.kinds[1])
    cache = SimpleNamespace(
        geometry=Geometry(job.layout, *size, *job.dims, job.dtype, META), key_cache=key, value_cache=value,
        layout=job.layout, scales=scales, k_scale=scales[0].tensor, v_scale=scales[1].tensor, k_kind=job.kinds[0],
        v_kind=job.kinds[1], likeness=0,
    )  # fmt: skip
    offsets = empty(job.sequences + 1, dtype=torch.int32)
    columns = 600 if job.sequences > 1 else 1
    batch = SimpleNamespace(
        block_table=empty(job.sequences, columns, dtype=torch.int32), cu_seqlens_q=offsets, cu_seqlens_k=offsets,
        max_q=job.new, max_k=columns * job.page_size, num_sequences=job.sequences, share=None,
    )  # fmt: skip
    rows, (q_heads, kv_heads) = job.sequences * job.new, job.heads
    tile = None if job.tile is None else direct.Tile(*job.tile)
    if tile is None:
        pads = [max(16, next_power_of_2(dim)) for dim in job.dims]
        operand_bytes = 4 if torch.float32 in (job.dtype, job.q_dtype) else 2
        tile = direct.choose_tile(
            job.new * q_heads // kv_heads, batch.max_k, job.sequences * kv_heads, *pads, 132, operand_bytes, job.layout
        )  # fmt: skip
    state = (empty(rows, q_heads, job.dims[1], dtype=job.q_dtype), empty(rows, q_heads)) if job.state else None
    driver.set_active(NoDriver(gpu))  # type: ignore[arg-type]
    try:
        direct.direct_attention(
            empty(rows, q_heads, job.dims[0], dtype=job.q_dtype), cache, batch, softmax_scale=0.125, tile=tile,  # type: ignore[arg-type]
            sinks=empty(q_heads) if job.sinks else None, window=job.window, state=state,
            begin=empty(job.sequences, dtype=torch.int32) if job.state else None,
        )  # fmt: skip
    except Exception as error:
        return {"error": words_of(error)}
    kernel, constants = captured.compiled, captured.constants
    return {
        "text": kernel.asm["ptx" if gpu.backend == "cuda" else "amdgcn"],
        "cubin": base64.b64encode(kernel.asm.get("cubin", b"")).decode(),
        "shared": kernel.metadata.shared,
        "constants": plain(constants),
    }


def plain(constants: dict[str, Any]) -> dict[str, Any]:
    """The kernel's constants for JSON: a form's attributes as "M", "K_COLUMNS", …, those of pools as "K_ALIGN", …"""
    told = {name: value for name, value in constants.items() if isinstance(value, int)}
    told["CODE"] = getattr(constants["CODE"], "name", "")
    for name, prefix in (("K", "K_"), ("V", "V_"), ("LAYER", ""), ("TILE", "")):
        for attribute, value in vars(constants[name]).items():
            told[prefix + attribute.upper()] = value if isinstance(value, (int, str)) else str(value)
    return told


if __name__ == "__main__":
    for job in pickle.load(sys.stdin.buffer):
        print(json.dumps(compile_one(job)), flush=True)
