"""The launch of the Hopper kernel. The module is imported only where the kernel is available."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..cache import PagedKVCache
from ..kernels.launch import PreparedLaunch, prepared_once
from .kernel import hopper_kernel
from .plan import Form, LayerForm


def attend(
    q: Tensor, cache: PagedKVCache, batch: CheckedBatch, scale_log2: float, sinks: Tensor | None, form: Form,
    likeness: int, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Attend as `attention.direct.direct_attention` does; the layer is one that `plan.runs` accepts.

    Args:
        q: `[n, q_heads, dim]`, head dims contiguous, n above 0.
        cache, batch: hold the keys, and say where.
        scale_log2: what scores are multiplied by, times log2 e.
        sinks: `[q_heads]`, contiguous, or None.
        form: of the kernel.
        likeness: the cache's.
        out: `[n, q_heads, dim]`, contiguous, in q's dtype; is overwritten.
        lse: `[n, q_heads]`, contiguous, FP32; is overwritten.
    """
    n, q_heads, _ = q.shape
    sequences, columns = batch.block_table.shape
    heads = cache.geometry.num_kv_heads
    max_q = min(batch.max_q, n)
    tiles = max(1, -(-max_q * (q_heads // heads) // form.rows))
    nothing = batch.cu_seqlens_q  # stands in for what is never read
    optional = [nothing if tensor is None else tensor for tensor in (sinks, cache.k_scale, cache.v_scale)]
    read = q, batch.block_table, batch.cu_seqlens_q, batch.cu_seqlens_k, optional[0]
    tensors = *read, out, lse, cache.key_cache, optional[1], cache.value_cache, optional[2]
    addresses = [tensor.data_ptr() for tensor in tensors]
    signature = (
        form, likeness, q.dtype, q.device, q_heads, q.stride(), None if sinks is None else sinks.dtype,
        tuple([address & 15 for address in addresses[:7]]),
    )  # fmt: skip
    launch = prepared_once("hopper attention", signature, lambda: _prepare(q, cache, sinks, form))
    programs = (sequences + 1) * tiles * heads
    numbers = sequences, columns, tiles, n, max_q
    launch(programs, (*tensors, scale_log2), (*addresses, scale_log2), numbers)


def _prepare(q: Tensor, cache: PagedKVCache, sinks: Tensor | None, form: Form) -> PreparedLaunch:
    """Prepare the launches for a layer and all that have its signature."""
    g = cache.geometry
    layer = LayerForm(
        dim=g.head_dim,
        page_size=g.page_size,
        heads=g.num_kv_heads,
        group=q.shape[1] // g.num_kv_heads,
        k_scaled=cache.k_scale is not None,
        v_scaled=cache.v_scale is not None,
        sinks=sinks is not None,
    )
    words = [tuple([stride // 16 for stride in pool.stride()[:3]]) for pool in (cache.key_cache, cache.value_cache)]
    return PreparedLaunch(
        hopper_kernel, (*(None,) * 7, torch.int32, None, torch.int32, None, None), (q.stride()[:2], *words),
        {"LAYER": layer, "FORM": form, "num_warps": 4}, interpreted=False,
    )  # fmt: skip
