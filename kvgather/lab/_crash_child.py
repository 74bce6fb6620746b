"""The child process of `kvgather.lab.crash`: runs one gather that may kill the process, and prints its result.

It prints one JSON object a line: first the device and torch's version, then the result if the gather returns.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

import torch
from torch import Tensor

import kvgather
from kvgather.formats.fp8 import quantize
from kvgather.formats.layout import convert
from kvgather.lab import before_fix
from kvgather.lab.child import leave_no_core
from kvgather.lab.fence import fenced

LAYOUT, PAGE_SIZE, NUM_HEADS, HEAD_DIM, NUM_BLOCKS = "SHUFFLE", 16, 2, 16, 32
LENGTHS = (5, 3)
SCALES = {"per-tensor": [0.5], "per-head": [0.5, 0.25]}
ARENA = 4096  # elements; an index [block, head, slot] of these pools is below 32 * 2 * 16


def place(values: list[float], placement: str, device: str) -> Tensor:
    """The scale next to a guard, in an ordinary GPU allocation, or at the start of an arena on a CPU."""
    scale = torch.tensor(values)
    if placement == "guarded":
        return fenced(scale, device)
    if device == "cuda":
        return scale.to(device)
    arena = torch.arange(ARENA, dtype=torch.float32)  # element i holds i: a wrong index gives a known scale
    arena[: len(values)] = scale
    return arena[: len(values)]


def run(kernel: str, scale: str, placement: str, device: str) -> dict[str, Any]:
    """Gather with one kernel and one kind of scale, and compare the rows with those of plain indexing."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_BLOCKS, PAGE_SIZE, NUM_HEADS, HEAD_DIM)
    pools = [quantize(torch.randn(shape, generator=generator), 0.5, torch.float8_e4m3fn) for _ in range(2)]
    block_table = torch.tensor([[20], [31]], dtype=torch.int32)
    per_head = torch.tensor(SCALES[scale])[:, None].expand(NUM_HEADS, 1)
    expected = [
        torch.cat([pool[b, :n].float() * per_head for (b,), n in zip(block_table, LENGTHS, strict=True)])
        for pool in pools
    ]
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    key_cache = convert(pools[0], "NHD", LAYOUT, "key").to(device)
    value_cache = convert(pools[1], "NHD", LAYOUT, "value").to(device)
    block_table, cu_seqlens = block_table.to(device), cu_seqlens.to(device)
    k_scale, v_scale = (place(SCALES[scale], placement, device) for _ in range(2))
    tokens = sum(LENGTHS)
    key, value = (torch.zeros(tokens, NUM_HEADS, HEAD_DIM, device=device) for _ in range(2))
    if kernel == "after":
        plan = kvgather.GatherPlan.build(
            block_table, cu_seqlens, page_size=PAGE_SIZE, num_blocks=NUM_BLOCKS, total_tokens=tokens
        )
        kvgather.gather(
            key_cache,
            value_cache,
            plan,
            layout=LAYOUT,
            k_scale=k_scale,
            v_scale=v_scale,
            out_dtype=torch.float32,
            out=(key, value),
            backend="triton",
        )
    else:
        launch = {
            "before": before_fix.cp_mha_gather_cache,
            "shipped-fix": before_fix.cp_mha_gather_cache_shipped_fix,
        }[kernel]
        launch(
            key_cache,
            value_cache,
            key,
            value,
            block_table,
            k_scale,
            v_scale,
            cu_seqlens,
            before_fix.token_to_batch(cu_seqlens),
            torch.zeros(len(LENGTHS), dtype=torch.int32, device=device),
            True,
            LAYOUT,
            tokens,
        )
    rows = [key.cpu(), value.cpu()]  # synchronizes: the driver reports an illegal access here
    if all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True)):
        return {"kind": "ok", "relative_error": 0.0}
    difference = torch.cat([(a - b).double().flatten() for a, b in zip(rows, expected, strict=True)])
    error = float(difference.norm() / torch.cat([b.double().flatten() for b in expected]).norm())
    return {"kind": "silent corruption", "relative_error": error if error < float("inf") else "inf"}


def main() -> None:
    kernel, scale, placement, device = sys.argv[1:]
    leave_no_core()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), Triton's interpreter"
    print(json.dumps({"device": name, "torch": torch.__version__}), flush=True)
    try:
        result = run(kernel, scale, placement, device)
    except RuntimeError as error:
        if device != "cuda" or "illegal memory access" not in str(error):
            raise
        message = next(line for line in str(error).splitlines() if "illegal memory access" in line)
        print(json.dumps({"kind": "illegal access", "message": message}), flush=True)
        os._exit(1)  # the CUDA context is dead, and a regular exit would report further errors
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
