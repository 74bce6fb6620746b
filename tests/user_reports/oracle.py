"""Expected results for the tests of user reports: plain torch in float64, independent of the package's numerics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import kvgather as kg

BACKENDS = ("torch", "triton")
PATHS = (("gather", None), ("gather", 48), ("direct", None))
"""Arguments of `prefix_attention`: `path`, and `workspace_tokens`."""
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0, torch.float8_e5m2: 57344.0}


def offsets(lengths: Sequence[int]) -> Tensor:
    """Prefix sums of lengths, int32 `[len(lengths) + 1]`."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def stored(values: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The values that a pool of `dtype` represents after a write of `values`, in float64; `scale` is broadcast."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    if dtype not in FP8_MAX:
        return values.to(dtype).double()
    maximum = FP8_MAX[dtype]
    return (values.float() / scale).clamp(-maximum, maximum).to(dtype).double() * scale.double()


def attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths_q: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last rows of each sequence, in float64.

    Args:
        q: `[sum(lengths_q), q_heads, dim]`.
        keys, values: for each sequence, `[tokens, kv_heads, dim]`.
        lengths_q: rows of each sequence.

    Returns:
        out `[rows, q_heads, dim]` and the natural log-sum-exp `[rows, q_heads]`.
    """
    outs, lses, row = [], [], 0
    for k, v, n in zip(keys, values, lengths_q, strict=True):
        rows = q[row : row + n].double()
        row += n
        group = q.shape[1] // k.shape[1]
        k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
        scores = torch.einsum("nhd,lhd->nhl", rows, k) * q.shape[2] ** -0.5
        position, key_position = torch.arange(len(k) - n, len(k))[:, None], torch.arange(len(k))[None]
        scores = scores.masked_fill((key_position > position)[:, None], -math.inf)
        lse = scores.logsumexp(2)
        weights = torch.where(lse[..., None] == -math.inf, 0.0, (scores - lse[..., None]).exp())
        outs.append(torch.einsum("nhl,lhd->nhd", weights, v))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal infinities, no NaN, and finite values within an absolute tolerance."""
    assert got.shape == wanted.shape
    assert not got.isnan().any()
    assert torch.equal(got.double().isinf(), wanted.isinf())
    finite = ~wanted.isinf()
    if finite.any():
        assert (got.double() - wanted)[finite].abs().max() <= tolerance


def poisoned(cache: kg.PagedKVCache) -> kg.PagedKVCache:
    """The cache with NaN in every slot: in the codes, and in the scales if each token has its own."""
    for pool in (cache.key_cache, cache.value_cache):
        if pool.dtype in FP8_MAX:
            pool.view(torch.uint8).fill_(0x80 if pool.dtype == torch.float8_e4m3fnuz else 0x7F)
        else:
            pool.fill_(math.nan)
    for scale in (cache.k_scale, cache.v_scale):
        if scale is not None and scale.ndim == 3:
            scale.fill_(math.nan)
    return cache


def scattered(lengths: Sequence[int], page: int, num_blocks: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A block table with block ids in random order and −1 after each sequence's end, and the slots of each sequence.

    No sequence uses block 0, which stays unwritten: a masked address often points into it.
    """
    ids = iter((1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed))).tolist())
    width = max([-(-n // page) for n in lengths] + [1])
    rows = [[next(ids) for _ in range(-(-n // page))] for n in lengths]
    slots = [
        torch.tensor([row[i // page] * page + i % page for i in range(n)]) for row, n in zip(rows, lengths, strict=True)
    ]
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32), slots
