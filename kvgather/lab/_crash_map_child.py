"""The child process of `kvgather.lab.crash_map`: gathers one token of one block with a one-element scale.

    python -m kvgather.lab._crash_map_child BLOCK_ID NUM_BLOCKS DEVICE

Everything is an ordinary allocation, in an engine's order: the scales, which come with the weights, then the pools. It
prints one JSON object a line: where the kernel will read, then the outcome, if the process is alive to print it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import torch
from torch import Tensor

from kvgather.lab import before_fix
from kvgather.lab.child import leave_no_core
from kvgather.lab.crash_map import HEADS, PAGE_SIZE, bytes_behind

HEAD_DIM = 16
SCALE = 0.5
DRIVER_ERROR = re.compile(r"(CUDA|HIP) error: |Error \[(CUDA|HIP)\]: ")
"""How torch's and Triton's messages of an error of the device begin; "CUDA out of memory" is not one."""


def place_of(address: int, scale: Tensor, pools: dict[str, Tensor]) -> str:
    """Which segment of torch's allocator has an address of the GPU."""
    for segment in torch.cuda.memory_snapshot():
        start, end = segment["address"], segment["address"] + segment["total_size"]
        if start <= address < end:
            owners = {"the scalar's segment": scale} | pools
            inside = [name for name, tensor in owners.items() if start <= tensor.data_ptr() < end]
            return inside[0] if inside else "another segment"
    return "no segment of torch"


def run(block_id: int, num_blocks: int, device: str) -> dict[str, Any]:
    """Gather the token, make one innocent call, and read the rows; the first of the three to raise is named."""
    scales = [torch.tensor([SCALE], device=device) for _ in range(2)]
    shape = (num_blocks, PAGE_SIZE, HEADS, HEAD_DIM)
    pools = [torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) for _ in range(2)]
    codes = torch.randn(shape[1:], generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    for pool in pools:
        pool[block_id] = codes.to(device)
    block_table = torch.tensor([[block_id]], dtype=torch.int32, device=device)
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=device)
    token_to_batch, seq_starts = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
    key, value = (torch.zeros(1, HEADS, HEAD_DIM, device=device) for _ in range(2))
    if device == "cuda":
        torch.cuda.synchronize()  # an error from here on is the gather's
        address = scales[0].data_ptr() + bytes_behind(block_id)
        place = place_of(address, scales[0], {"the pool of K": pools[0], "the pool of V": pools[1]})
        print(json.dumps({"place": place}), flush=True)
    stage = "the gather"
    try:
        before_fix.cp_mha_gather_cache(
            pools[0],
            pools[1],
            key,
            value,
            block_table,
            scales[0],
            scales[1],
            cu_seqlens,
            token_to_batch,
            seq_starts,
            True,
            "NHD",
            1,
        )
        stage = "the next call"
        torch.randn(4, device=device)
        stage = "the copy to the host"
        rows = key.cpu()
    except RuntimeError as error:
        message = next((line for line in str(error).splitlines() if DRIVER_ERROR.search(line)), "")
        if device != "cuda" or not message:
            raise
        return {"outcome": "illegal access", "raised_by": stage, "message": message}
    exact = torch.equal(rows[0], codes[0].float() * SCALE)
    used = [rows[0, head].abs().max() / codes[0, head].float().abs().max() for head in (0, HEADS - 1)]
    return {
        "outcome": "ok" if exact else "silent corruption",
        "scales_used": " ".join(f"{float(scale):.4g}" for scale in used),
    }


def main() -> None:
    block_id, num_blocks, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    leave_no_core()
    result = run(block_id, num_blocks, device)
    print(json.dumps(result), flush=True)
    if result["outcome"] == "illegal access":
        os._exit(1)  # the CUDA context is dead, and a regular exit would report further errors


if __name__ == "__main__":
    main()
