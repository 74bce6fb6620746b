"""The attention function that transformers calls in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..attention.dense import dense_attention
from ..attention.merge import apply_sinks
from ..attention.prefix import prefix_attention
from ..cache import PagedKVCache
from .options import Gather, Options
from .step import GroupStep, Part

NAME = "kvgather"
"""Our name among transformers' attention implementations. A name with "flash" in it would be redirected."""


def engine_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    kvgather: tuple[PagedKVCache, GroupStep, Options] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write a step's new tokens to the layer's pool, and attend to all tokens before them.

    Args:
        module: the layer, unused.
        query: `[1, q_heads, new tokens, head_dim]`.
        key, value: `[1, kv_heads, new tokens, head_dim]`.
        attention_mask: unused: the lengths in the step say what a token sees.
        scaling: factor of the scores.
        dropout: 0; the engine does not train.
        sliding_window: how many keys a token sees at most, or None.
        s_aux: `[q_heads]`, the sinks, or None.
        kvgather: the layer's pool, the step and the options, from `PoolCache.update`.

    Returns:
        `[1, new tokens, q_heads, head_dim]`, and None for the weights.

    Raises:
        ValueError: the call is not one of the engine.
    """
    if kvgather is None:
        raise ValueError(
            f"attn_implementation is {NAME!r} outside of continuous batching; accepted there: any of transformers' own"
        )
    pool, step, options = kvgather
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if options.gather is None or step.extended is None:
        out = prefix_attention(
            q, k, v, pool, step.batch, scaling, sinks=s_aux, window=sliding_window, path=options.path,
            workspace_tokens=options.workspace_tokens,
        )  # fmt: skip
    else:
        out = _attend_in_parts(q, k, v, pool, step, options, options.gather, scaling, s_aux, sliding_window)
    return out.unsqueeze(0), None


def _attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, pool: PagedKVCache, step: GroupStep, options: Options, gather: Gather,
    scaling: float | None, sinks: Tensor | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Attend with another gather for the prefills that continue cached tokens, as engines do."""
    pool.write(k, v, step.batch.slots)
    out = q.new_empty(*q.shape[:2], pool.geometry.v_head_dim)
    if step.others is not None:
        rows = _rows(step.others, q)
        out[rows] = prefix_attention(
            q[rows], None, None, pool, step.others.batch, scaling, sinks=sinks, window=window, path=options.path,
            workspace_tokens=options.workspace_tokens,
        )  # fmt: skip
    if step.extended is not None:
        rows, batch = _rows(step.extended, q), step.extended.batch
        keys, values = gather(pool, batch, q.dtype)
        part, lse = dense_attention(
            q[rows].contiguous(), keys, values, batch.cu_seqlens_q, batch.cu_seqlens_k, max_q=batch.max_q,
            max_k=batch.max_k, softmax_scale=pool.geometry.head_dim**-0.5 if scaling is None else scaling,
            window=window, seqlens_q=batch.seqlens_q, seqlens_k=batch.seqlens_k,
        )  # fmt: skip
        out[rows] = part if sinks is None else apply_sinks(part, lse, sinks)[0].to(q.dtype)
    return out


def _rows(part: Part, q: Tensor) -> Tensor | slice:
    return slice(0, len(q)) if part.rows is None else part.rows


def _no_mask(*_: object, **__: object) -> None:
    """Every mask of the model: none."""


def register() -> None:
    """Make the function known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, engine_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
