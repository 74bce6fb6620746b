"""The limits that kernels are compared with on a GPU: a contiguous cast with a scale, which is a gather without its
indices, and one read of memory."""

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
"""Elements and warps of a program of the cast; the fastest tile is the limit."""


@triton.jit
def cast_kernel(
    in_ptr, scale_ptr, out_ptr, n,
    BLOCK: tl.constexpr, CODE: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """out[i] = round(decode(in[i]) · scale): a gather whose rows are contiguous in the pool."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(in_ptr + offset, mask=offset < n, other=0)
    values = widen(codes, CODE, HARDWARE) * tl.load(scale_ptr)
    tl.store(out_ptr + offset, round_to(values, out_ptr.dtype.element_ty, BY_HAND), mask=offset < n)


def cast(codes: Tensor, scale: Tensor, out: Tensor, tile: tuple[int, int] = CAST_TILES[0]) -> None:
    """`out = (codes.float() * scale).to(out.dtype)` on contiguous memory.

    Args:
        codes: `[n]`, any pool dtype.
        scale: FP32, one element.
        out: `[n]`, a float dtype.
        tile: elements and warps of a program.
    """
    fmt = FORMATS.get(codes.dtype)
    interpreted = interpreting()
    block, num_warps = tile
    with launching(codes, interpreted):
        cast_kernel[(triton.cdiv(codes.numel(), block),)](
            codes.view(torch.uint8) if fmt is not None else codes,
            scale,
            out,
            codes.numel(),
            BLOCK=block,
            CODE=fmt,
            HARDWARE=not interpreted and (fmt is None or fp8_support(codes.device)[codes.dtype] == "hardware"),
            BY_HAND=interpreted,
            num_warps=num_warps,
        )


READ_TILES = ((2048, 4), (4096, 4), (4096, 8), (8192, 8))
"""Words and warps of a program of the read; the fastest tile is the limit."""


@triton.jit
def read_kernel(in_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out[program] = sum of its BLOCK words: one read of memory, and almost no write."""
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(in_ptr + offset, mask=offset < n, other=0)  # 4 words, 16 bytes, per thread
    tl.store(out_ptr + program, tl.sum(words, 0))


def read_results(words: Tensor, tile: tuple[int, int]) -> Tensor:
    """The output of `read`: one word for each program, `[programs]` int32."""
    return torch.empty(triton.cdiv(words.numel(), tile[0]), dtype=torch.int32, device=words.device)


def read(words: Tensor, out: Tensor, tile: tuple[int, int] = READ_TILES[0]) -> None:
    """Read memory once and write almost nothing: each program writes the sum of its words, which must fit in int32.

    Args:
        words: `[n]` int32, contiguous.
        out: from `read_results`.
        tile: words and warps of a program.
    """
    block, num_warps = tile
    with launching(words, interpreting()):
        read_kernel[(len(out),)](words, out, words.numel(), BLOCK=block, num_warps=num_warps)
