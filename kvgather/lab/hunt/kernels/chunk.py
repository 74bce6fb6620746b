"""A gather of K for chunks of several requests, each from a position of its own."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def chunk_kernel(out_ptr, k_ptr, table_ptr, cu_ptr, starts_ptr, width, PAGE: tl.constexpr, DIM: tl.constexpr):
    request, token = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, DIM)
    first, end = tl.load(cu_ptr + request), tl.load(cu_ptr + request + 1)
    if first + token < end:
        position = tl.load(starts_ptr + request) + token
        column = position // PAGE
        block = tl.load(table_ptr + request * width + column)
        slot = block * PAGE + position % PAGE
        k = tl.load(k_ptr + slot * DIM + dim)
        tl.store(out_ptr + (first + token) * DIM + dim, k)


def gather_chunks(
    out: Tensor, k: Tensor, table: Tensor, cu_seqlens: Tensor, starts: Tensor, longest: int, kernel: Any = chunk_kernel
) -> None:
    """Gather K of `cu_seqlens[b + 1] - cu_seqlens[b]` tokens of each request b, from position `starts[b]` on.

    `k` is [blocks, page_size, dim], FP32; `table` [batch, width], `cu_seqlens` [batch + 1] and `starts` [batch] are
    int32; `out` is [tokens, dim]. A position beyond the last column of `table` belongs to no block: its row is zero.
    """
    _, page_size, dim = k.shape
    kernel[(len(starts), longest)](out, k, table, cu_seqlens, starts, table.shape[1], PAGE=page_size, DIM=dim)


def oracle(
    out: Tensor, k: Tensor, table: Tensor, cu_seqlens: Tensor, starts: Tensor, longest: int
) -> dict[str, Tensor]:
    """The rows, one token at a time."""
    page_size, rows = k.shape[1], torch.zeros_like(out)
    for b, row in enumerate(table.tolist()):
        for i in range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])):
            column, page_offset = divmod(int(starts[b]) + i - int(cu_seqlens[b]), page_size)
            if column < len(row):
                rows[i] = k[row[column], page_offset]
    return {"out": rows}


def inputs(lengths: list[int], starts: list[int], width: int = 2, rest: float | None = None) -> dict[str, Any]:
    """Requests with `width` blocks each, in a pool of pages of 4 slots; `rest`, if given, in slots without a token."""
    blocks = len(lengths) * width + 2
    generator = torch.Generator().manual_seed(3)
    table = torch.randperm(blocks, generator=generator)[: len(lengths) * width].view(-1, width)
    k = torch.randn(blocks, 4, 8, generator=generator)
    if rest is not None:
        slots = (table[:, :, None] * 4 + torch.arange(4)).flatten(1)  # [batch, width * 4]
        used = [row[: start + length] for row, start, length in zip(slots, starts, lengths, strict=True)]
        free = torch.ones(blocks * 4, dtype=torch.bool).index_fill(0, torch.cat(used), False)
        k[free.view(blocks, 4)] = rest
    return {
        "out": torch.full((sum(lengths), 8), float("nan")),
        "k": k,
        "table": table.int(),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "starts": torch.tensor(starts, dtype=torch.int32),
        "longest": max(lengths),
    }
