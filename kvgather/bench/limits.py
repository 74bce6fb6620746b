"""The limit a gather is held against on a GPU: a contiguous cast with a scale, the gather without the gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import fp8_support, interpreting
from ..formats.fp8 import FORMATS
from ..gather.kernel import launching, round_to, widen

CAST_TILES = ((1024, 4), (2048, 4), (4096, 8))
"""Elements and warps of a program of the cast; whichever is fastest is the limit."""


@triton.jit
def cast_kernel(
    in_ptr, scale_ptr, out_ptr, n,
    BLOCK: tl.constexpr, FORMAT: tl.constexpr, BIAS: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if FORMAT == "":
        held = tl.load(in_ptr + offset, mask=offset < n, other=0.0)
    else:
        held = tl.load(in_ptr + offset, mask=offset < n, other=0)
    values = widen(held, FORMAT, BIAS, HARDWARE) * tl.load(scale_ptr)
    tl.store(out_ptr + offset, round_to(values, out_ptr.dtype.element_ty, BY_HAND), mask=offset < n)


def cast(held: Tensor, scale: Tensor, out: Tensor, tile: tuple[int, int] = CAST_TILES[0]) -> None:
    """`out = (held.float() * scale).to(out.dtype)` on contiguous memory.

    Args:
        held: `[n]`, any pool dtype; FP8 as itself.
        scale: FP32, one element.
        out: `[n]`, a float dtype.
        tile: elements and warps of a program.
    """
    fmt = FORMATS.get(held.dtype)
    interpreted = interpreting()
    block, num_warps = tile
    with launching(held, interpreted):
        cast_kernel[(triton.cdiv(held.numel(), block),)](
            held.view(torch.uint8) if fmt is not None else held,
            scale,
            out,
            held.numel(),
            BLOCK=block,
            FORMAT="" if fmt is None else fmt.name,
            BIAS=0 if fmt is None else fmt.bias,
            HARDWARE=not interpreted and (fmt is None or fp8_support(held.device)[held.dtype] == "hardware"),
            BY_HAND=interpreted,
            num_warps=num_warps,
        )
