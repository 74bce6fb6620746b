"""Attention over a cached prefix and a new suffix: a partial result for each, merged."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def partial_kernel(out_ptr, sums_ptr, q_ptr, k_ptr, v_ptr, keys, KEYS: tl.constexpr, DIM: tl.constexpr):
    head, row, dim = tl.program_id(0), tl.arange(0, KEYS), tl.arange(0, DIM)
    at = row[:, None] * DIM + dim  # [keys, dim]
    k = tl.load(k_ptr + at, mask=row[:, None] < keys, other=0.0)
    v = tl.load(v_ptr + at, mask=row[:, None] < keys, other=0.0)
    q = tl.load(q_ptr + head * DIM + dim) * 1.4426950408889634
    score = tl.where(row < keys, tl.sum(q * k, 1), -float("inf"))
    top = tl.max(score, 0)
    weight = tl.exp2(score - top)
    total = tl.sum(weight, 0)
    tl.store(out_ptr + head * DIM + dim, tl.sum(weight[:, None] * v, 0) / total)
    tl.store(sums_ptr + head, top + tl.log2(total))


@triton.jit
def merge_kernel(out_ptr, a_ptr, b_ptr, a_sums_ptr, b_sums_ptr, DIM: tl.constexpr):
    head = tl.program_id(0)
    at = head * DIM + tl.arange(0, DIM)
    a_sum, b_sum = tl.load(a_sums_ptr + head), tl.load(b_sums_ptr + head)
    top = tl.maximum(a_sum, b_sum)
    a_weight, b_weight = tl.exp(a_sum - top), tl.exp(b_sum - top)
    tl.store(out_ptr + at, (tl.load(a_ptr + at) * a_weight + tl.load(b_ptr + at) * b_weight) / (a_weight + b_weight))


def attend_in_two(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached: int,
    partial: Any = partial_kernel,
    merge: Any = merge_kernel,
) -> None:
    """Fill `out` [heads, dim] with attention of `q` [heads, dim], scaled, over `k` and `v` [keys, dim], FP32.

    The first `cached` keys and the others are attended to in a launch each. A partial result is the attention over
    its own keys, [heads, dim], and the logarithm to base 2 of the sum of its exponentials, [heads].
    """
    heads, dim = q.shape
    parts = []
    for k_part, v_part in ((k[:cached], v[:cached]), (k[cached:], v[cached:])):
        part, sums = torch.empty_like(q), torch.empty(heads)
        lanes = triton.next_power_of_2(len(k_part))
        partial[(heads,)](part, sums, q, k_part, v_part, len(k_part), KEYS=lanes, DIM=dim)
        parts.append((part, sums))
    (a, a_sums), (b, b_sums) = parts
    merge[(heads,)](out, a, b, a_sums, b_sums, DIM=dim)


def oracle(out: Tensor, q: Tensor, k: Tensor, v: Tensor, cached: int) -> dict[str, Tensor]:
    """Softmax over all keys at once."""
    return {"out": (q @ k.T).softmax(-1) @ v}


def inputs(cached: int, new: int, alike: bool = False) -> dict[str, Any]:
    """Random keys; with `alike`, the new keys are those of the prefix, and both parts weigh the same."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(n, 16, generator=generator) for n in (3, cached + new, cached + new))
    if alike:
        k[cached:] = k[:cached]
    return {"out": torch.full((3, 16), float("nan")), "q": q * 0.5, "k": k, "v": v, "cached": cached}
