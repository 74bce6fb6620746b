"""A copy of the pages of one sequence into consecutive rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pages_kernel(out_ptr, k_ptr, table_ptr, stride_k_slot, PAGE: tl.constexpr, DIM: tl.constexpr):
    page = tl.program_id(0)
    row, dim = tl.arange(0, PAGE)[:, None], tl.arange(0, DIM)
    block = tl.load(table_ptr + page)
    first = block * PAGE * stride_k_slot
    rows = tl.load(k_ptr + first + row * stride_k_slot + dim)  # [page, dim]
    tl.store(out_ptr + (page * PAGE + row) * DIM + dim, rows)


def copy_pages(out: Tensor, k: Tensor, table: Tensor, kernel: Any = pages_kernel) -> None:
    """Copy the blocks of K that `table` [pages] names to `out` [pages * page_size, dim].

    `k` is [blocks, page_size, dim], FP32: a pool, or a view of one. The pool is never copied; it has gigabytes.
    """
    _, page_size, dim = k.shape
    kernel[(len(table),)](out, k, table, k.stride(1), PAGE=page_size, DIM=dim)


def oracle(out: Tensor, k: Tensor, table: Tensor) -> dict[str, Tensor]:
    """The rows by indexing."""
    return {"out": k[table.long()].reshape(out.shape)}


def inputs(
    table: list[int], planes: int = 2, plane: int = 0, blocks: int = 6, gap: int = 0, rest: float | None = None
) -> dict[str, Any]:
    """K is one of several planes of an allocation [blocks, planes, 4, 8 + gap]; with one plane it is contiguous.

    `rest`, if given, is in all blocks that `table` does not name.
    """
    pool = torch.randn(blocks, planes, 4, 8 + gap, generator=torch.Generator().manual_seed(planes))
    if rest is not None:
        pool[[block for block in range(blocks) if block not in table]] = rest
    return {
        "out": torch.full((len(table) * 4, 8), float("nan")),
        "k": pool[:, plane, :, :8],
        "table": torch.tensor(table, dtype=torch.int32),
    }
