"""Implementations next to ours, mostly of others, and the forms in which they take a case's pool, pages and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases.prefix import BuiltPrefix
from ..formats.fp8 import computed_scale, dequantize, quantize

Attending = Callable[[], Tensor]
"""A call to time; it returns the output rows, `[new tokens, q_heads, head_dim]`."""
FP8 = torch.float8_e4m3fn


class NotUsable(Exception):
    """A peer cannot be used on this machine; the message says why."""


@dataclass(frozen=True)
class Peer:
    """An implementation to time next to ours.

    Attributes:
        version: the package or file that it comes from, with its version; "" for this one.
        prepare: builds the call to time. The new tokens of its argument are in the cache already.
        itemsize: bytes of one number of the pool that it reads.
    """

    version: str
    prepare: Callable[[BuiltPrefix], Attending]
    itemsize: int = 1


@dataclass(frozen=True)
class Paged:
    """The arguments of attention over pages in the NHD layout.

    Attributes:
        q: `[new tokens, q_heads, head_dim]`, in the dtype of the pools.
        k_pool, v_pool: `[blocks, page_size, kv_heads, head_dim]`.
        page_table: `[sequences, pages]` int32, contiguous; 0 for entries past a sequence's tokens.
        cu_seqlens_q: `[sequences + 1]` int32, offsets of the sequences in q.
        seqlens_k: `[sequences]` int32, cached + new tokens.
        max_q, max_k: the longest sequence's new tokens, and its cached + new tokens.
        scales: of q, K and V, `[sequences, kv_heads]` FP32 each; None if the pools are not quantized.
    """

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    max_q: int
    max_k: int
    scales: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def page_size(self) -> int:
        return self.k_pool.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k_pool.shape[2]

    @property
    def softmax_scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def bf16_pool(built: BuiltPrefix) -> Paged:
    """A BF16 copy of the decoded pools, and q as it is."""
    cache = built.cache
    pools = ((cache.key_cache, cache.k_scale), (cache.value_cache, cache.v_scale))
    k_pool, v_pool = (dequantize(pool, scale, torch.bfloat16) for pool, scale in pools)
    return _paged(built, built.q, k_pool, v_pool)


def fp8_pool(built: BuiltPrefix) -> Paged:
    """The FP8 pools as they are, with q in FP8, quantized with one scale for the query heads of a KV head."""
    case, cache = built.case, built.cache
    assert cache.k_scale is not None and cache.v_scale is not None
    grouped = built.q.float().unflatten(1, (case.kv_heads, -1))  # [new tokens, kv_heads, group, dim]
    q_scale = computed_scale(grouped.transpose(0, 1).flatten(1), FP8)  # [kv_heads]
    q = quantize(grouped, q_scale[:, None, None], FP8).flatten(1, 2)
    scales = [
        scale.expand(len(case.new), case.kv_heads).contiguous() for scale in (q_scale, cache.k_scale, cache.v_scale)
    ]
    return _paged(built, q, cache.key_cache, cache.value_cache, (scales[0], scales[1], scales[2]))


def _paged(
    built: BuiltPrefix, q: Tensor, k_pool: Tensor, v_pool: Tensor, scales: tuple[Tensor, Tensor, Tensor] | None = None
) -> Paged:
    batch = built.batch
    pages = -(-batch.max_k // batch.page_size)
    return Paged(
        q=q, k_pool=k_pool, v_pool=v_pool, page_table=batch.block_table[:, :pages].clamp_min(0),
        cu_seqlens_q=batch.cu_seqlens_q, seqlens_k=batch.cu_seqlens_k.diff(), max_q=batch.max_q, max_k=batch.max_k,
        scales=scales,
    )  # fmt: skip
