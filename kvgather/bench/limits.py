"""The limits that kernels are held against on a GPU: a contiguous cast with a scale, which is the gather without the
gather, and reading memory once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import fp8_support, interpreting
from ..formats.fp8 import FORMATS
from ..kernels.launch import launching
from ..kernels.values import round_to, widen

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


READ_TILES = ((2048, 4), (4096, 4), (4096, 8), (8192, 8))
"""Words and warps of a program that reads; whichever is fastest is the limit."""


@triton.jit
def read_kernel(in_ptr, out_ptr, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(in_ptr + offset, mask=offset < n, other=0)  # a lane's neighbours are 4 words, 16 bytes
    tl.store(out_ptr + program, tl.sum(words, 0))


def read_results(words: Tensor, tile: tuple[int, int]) -> Tensor:
    """Where `read` puts one word for each program, `[programs]` int32."""
    return torch.empty(triton.cdiv(words.numel(), tile[0]), dtype=torch.int32, device=words.device)


def read(words: Tensor, out: Tensor, tile: tuple[int, int] = READ_TILES[0]) -> None:
    """Read memory once, with next to nothing written: each program the sum of its words, which has to fit in one.

    Args:
        words: `[n]` int32, contiguous.
        out: from `read_results`.
        tile: words and warps of a program.
    """
    block, num_warps = tile
    with launching(words, interpreting()):
        read_kernel[(len(out),)](words, out, words.numel(), BLOCK=block, num_warps=num_warps)
