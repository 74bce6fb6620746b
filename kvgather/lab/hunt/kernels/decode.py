"""Decode attention straight from the pages of the pool."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def decode_kernel(out_ptr, q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, width, PAGE: tl.constexpr, DIM: tl.constexpr):
    request = tl.program_id(0)
    row, dim = tl.arange(0, PAGE), tl.arange(0, DIM)
    length = tl.load(lengths_ptr + request)
    q = tl.load(q_ptr + request * DIM + dim)
    highest, total = -float("inf"), 0.0
    values = tl.zeros([DIM], tl.float32)
    for page in range(tl.cdiv(length, PAGE)):
        block = tl.load(table_ptr + request * width + page)
        inside = page * PAGE + row < length
        at = (block * PAGE + row[:, None]) * DIM + dim  # [page, dim]
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
        score = tl.where(inside, tl.sum(q * k, 1), -float("inf"))
        top = tl.maximum(highest, tl.max(score, 0))
        weight, old = tl.exp(score - top), tl.exp(highest - top)
        total = total * old + tl.sum(weight, 0)
        values = values * old + tl.sum(weight[:, None] * v, 0)
        highest = top
    tl.store(out_ptr + request * DIM + dim, values / total)


def decode_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, kernel: Any = decode_kernel
) -> None:
    """Fill `out` [batch, dim] with attention of `q` [batch, dim], scaled, over the first `lengths[b]` keys.

    `k` and `v` are pools [blocks, page_size, dim], FP32, which are never copied or cleared; `table` [batch, width]
    and `lengths` [batch], at least 1, are int32. Slots that belong to no token may contain anything.
    """
    _, page_size, dim = k.shape
    kernel[(len(q),)](out, q, k, v, table, lengths, table.shape[1], PAGE=page_size, DIM=dim)


def oracle(out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Softmax over the keys of each request's own slots."""
    page_size, rows = k.shape[1], []
    for b, length in enumerate(lengths.tolist()):
        slots = [int(table[b, i // page_size]) * page_size + i % page_size for i in range(length)]
        keys, values = k.flatten(0, 1)[slots], v.flatten(0, 1)[slots]
        rows.append((keys @ q[b]).softmax(0) @ values)
    return {"out": torch.stack(rows)}


def inputs(lengths: list[int], rest: float = 0.0, rest_of_k: float | None = None) -> dict[str, Any]:
    """Random K and V in the slots of the requests, and `rest` in all other slots of the two pools."""
    width = max(-(-length // 4) for length in lengths)
    blocks = len(lengths) * width + 2
    generator = torch.Generator().manual_seed(6)
    table = torch.randperm(blocks, generator=generator)[: len(lengths) * width].view(-1, width)
    k = torch.full((blocks, 4, 8), rest if rest_of_k is None else rest_of_k)
    v = torch.full((blocks, 4, 8), rest)
    for b, length in enumerate(lengths):
        for i in range(length):
            for pool in (k, v):
                pool[table[b, i // 4], i % 4] = torch.randn(8, generator=generator)
    return {
        "out": torch.full((len(lengths), 8), float("nan")),
        "q": torch.randn(len(lengths), 8, generator=generator) * 0.5,
        "k": k,
        "v": v,
        "table": table.int(),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }
