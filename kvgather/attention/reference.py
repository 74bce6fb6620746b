"""Reference attention, the specification of all paths: the formula in float64, one sequence at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


@torch.no_grad()
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention: query i of a sequence has position len_k − len_q + i, and sees the keys up to this position.

    Args:
        q: `[n_q, q_heads, dim]`; query head h reads KV head h // (q_heads // kv_heads).
        k, v: `[n_k, kv_heads, dim]` and `[n_k, kv_heads, v_dim]`.
        cu_seqlens_q, cu_seqlens_k: `[batch + 1]`, offsets of the sequences in the rows of q, and of k and v.
        softmax_scale: factor of the scores; None means `dim ** -0.5`.
        sinks: `[q_heads]`, a logit per head that is added to the softmax denominator only.
        window: how many keys a query sees at most, itself included; None means all.

    Returns:
        out `[n_q, q_heads, v_dim]` and the natural log-sum-exp `[n_q, q_heads]`, which includes the sink; both float64.
        A row that sees no key is 0, with log-sum-exp −inf or the sink.
    """
    (_, q_heads, dim), kv_heads = q.shape, k.shape[1]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    grouped = q.double().unflatten(1, (kv_heads, q_heads // kv_heads))  # [n_q, kv_heads, group, dim]
    out = torch.zeros((*grouped.shape[:3], v.shape[2]), dtype=torch.float64, device=q.device)
    lse = torch.full(grouped.shape[:3], -math.inf, dtype=torch.float64, device=q.device)
    if sinks is not None:
        lse[:] = sinks.double().view(1, kv_heads, -1)
    for (q_begin, q_end), (k_begin, k_end) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        rows, keys = slice(q_begin, q_end), slice(k_begin, k_end)
        position = torch.arange(q_end - q_begin, device=q.device)[:, None] + (k_end - k_begin) - (q_end - q_begin)
        key = torch.arange(k_end - k_begin, device=q.device)
        visible = key <= position  # [rows, keys]
        if window is not None:
            visible &= key > position - window
        scores = torch.einsum("ihgd,jhd->hgij", grouped[rows], k[keys].double()) * scale
        scores = scores.masked_fill(~visible, -math.inf)
        lse[rows] = torch.logaddexp(lse[rows], scores.logsumexp(-1).permute(2, 0, 1))
        weights = torch.exp(scores - lse[rows].permute(1, 2, 0)[..., None]).masked_fill(~visible, 0)
        out[rows] = torch.einsum("hgij,jhd->ihgd", weights, v[keys].double())
    return out.flatten(1, 2), lse.flatten(1, 2)
