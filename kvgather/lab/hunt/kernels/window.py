"""Decode attention with a sliding window: one query of each request over its last keys."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def window_kernel(out_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, tokens, left, DIM: tl.constexpr, TILE: tl.constexpr):
    request = tl.program_id(0)
    dim, row = tl.arange(0, DIM), tl.arange(0, TILE)
    length = tl.load(lengths_ptr + request)
    q = tl.load(q_ptr + request * DIM + dim)
    highest, total = -float("inf"), 0.0
    values = tl.zeros([DIM], tl.float32)
    first = tl.maximum(length - left, 0)
    for start in range(first, length, TILE):
        token = start + row
        inside = token < length
        at = (request * tokens + token[:, None]) * DIM + dim  # [tile, dim]
        k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
        score = tl.where(inside, tl.sum(q * k, 1), -float("inf"))
        top = tl.maximum(highest, tl.max(score, 0))
        weight, old = tl.exp(score - top), tl.exp(highest - top)
        total = total * old + tl.sum(weight, 0)
        values = values * old + tl.sum(weight[:, None] * v, 0)
        highest = top
    tl.store(out_ptr + request * DIM + dim, values / total)


def window_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window_left: int, kernel: Any = window_kernel
) -> None:
    """Fill `out` [batch, dim] with attention of the last token of each request.

    `q` is [batch, dim], scaled; `k` and `v` are [batch, tokens, dim], FP32; `lengths` [batch] int32, at least 1. The
    query sees its own key, and the `window_left` keys before it.
    """
    kernel[(len(q),)](out, q, k, v, lengths, k.shape[1], window_left, DIM=q.shape[1], TILE=4)


def oracle(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window_left: int) -> dict[str, Tensor]:
    """Softmax over the visible keys of each request."""
    rows = []
    for b, length in enumerate(lengths.tolist()):
        visible = range(max(0, length - 1 - window_left), length)
        weights = torch.stack([q[b] @ k[b, i] for i in visible]).softmax(0)
        rows.append(sum(weight * v[b, i] for weight, i in zip(weights, visible, strict=True)))
    return {"out": torch.stack([torch.as_tensor(row) for row in rows])}


def inputs(
    lengths: list[int],
    window_left: int = 7,
    marked: bool = False,
    tokens: int = 12,
    rest: float = float("nan"),
) -> dict[str, Any]:
    """Random K and V; with `marked`, all keys are alike and each V marks its row, so that no row can hide.

    `rest` is in all rows behind the last token of a request.
    """
    batch, dim = len(lengths), 16
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(batch, tokens, dim, generator=generator) for _ in range(3))
    if marked:
        k, v = torch.zeros_like(k), torch.eye(tokens, dim).repeat(batch, 1, 1)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = rest
    return {
        "out": torch.full((batch, dim), float("nan")),
        "q": q[:, 0].contiguous(),
        "k": k,
        "v": v,
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "window_left": window_left,
    }
