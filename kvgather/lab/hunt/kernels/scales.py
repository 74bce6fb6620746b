"""A gather of INT8 rows, each multiplied by the scale of its token and head."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def scales_kernel(out_ptr, codes_ptr, scale_ptr, table_ptr, PAGE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    page, head = tl.program_id(0), tl.program_id(1)
    page_offset, dim = tl.arange(0, PAGE), tl.arange(0, DIM)
    block = tl.load(table_ptr + page)
    row = (block * PAGE + page_offset) * HEADS + head  # [page]
    codes = tl.load(codes_ptr + row[:, None] * DIM + dim)
    scale = tl.load(scale_ptr + row)
    values = codes.to(tl.float32) * scale[:, None]
    out_row = (page * PAGE + page_offset) * HEADS + head
    tl.store(out_ptr + out_row[:, None] * DIM + dim, values)


def scaled_rows(out: Tensor, codes: Tensor, scale: Tensor, table: Tensor, kernel: Any = scales_kernel) -> None:
    """Gather the pages that `table` [pages] int32 names to `out` [pages * page_size, heads, dim], FP32.

    `codes` is [blocks, page_size, heads, dim], INT8; `scale` is [blocks, heads, page_size], FP32; both are contiguous
    and never copied.
    """
    _, page_size, heads, dim = codes.shape
    kernel[(len(table), heads)](out, codes, scale, table, PAGE=page_size, HEADS=heads, DIM=dim)


def oracle(out: Tensor, codes: Tensor, scale: Tensor, table: Tensor) -> dict[str, Tensor]:
    """The rows, one token and head at a time."""
    rows, page_size = torch.zeros_like(out), codes.shape[1]
    for token in range(len(rows)):
        block, page_offset = int(table[token // page_size]), token % page_size
        for head in range(codes.shape[2]):
            rows[token, head] = codes[block, page_offset, head].float() * scale[block, head, page_offset]
    return {"out": rows}


def inputs(
    table: list[int],
    heads: int = 2,
    page_size: int = 4,
    equal: bool = False,
    blocks: int = 6,
    rest: float | None = None,
) -> dict[str, Any]:
    """Random codes and scales; with `equal`, all scales are 0.5.

    `rest`, if given, is the scale in all blocks that `table` does not name.
    """
    generator = torch.Generator().manual_seed(8)
    scale = torch.rand(blocks, heads, page_size, generator=generator) + 0.5
    if rest is not None:
        scale[[block for block in range(blocks) if block not in table]] = rest
    codes = torch.randint(-127, 128, (blocks, page_size, heads, 8), generator=generator, dtype=torch.int8)
    return {
        "out": torch.full((len(table) * page_size, heads, 8), float("nan")),
        "codes": codes,
        "scale": torch.full_like(scale, 0.5) if equal else scale,
        "table": torch.tensor(table, dtype=torch.int32),
    }
