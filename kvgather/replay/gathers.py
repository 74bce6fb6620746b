"""The gathers that the replay can put into the engine: before the fix, with upstream's fix, and this package's.

The first two are our rewrites of upstream's kernel in `kvgather.lab.before_fix`. An engine calls them with contiguous
pools and with the default flag `per_token_quant=True`; both are done here, in the place of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..attention.batch import PrefixBatch
from ..cache import PagedKVCache
from ..lab.fence import fenced
from ..serving.options import Gather


def gather_named(name: str) -> Gather | None:
    """The gather of a name: "before", "shipped-fix" or "after"; None is this package's own, for "after"."""
    if name == "after":
        return None
    from ..lab import before_fix  # imports triton, which may be missing

    return gather_calling(
        before_fix.cp_mha_gather_cache if name == "before" else before_fix.cp_mha_gather_cache_shipped_fix
    )


def gather_calling(call: Callable[..., None]) -> Gather:
    """A gather that calls a function with the first 13 arguments of `before_fix.cp_mha_gather_cache`.

    The flag `per_token_quant` is not among them: the function's default decides.
    """

    def gather(pool: PagedKVCache, batch: PrefixBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return call_as_engine(call, pool, batch, dtype)

    return gather


def call_as_engine(
    call: Callable[..., None], pool: PagedKVCache, batch: PrefixBatch, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Call a gather as engines do: **the flag is left at its default, and the scale has one element.**"""
    from ..lab.before_fix import token_to_batch

    g = pool.geometry
    key, value = (
        torch.empty(batch.total_k, g.num_kv_heads, dim, dtype=dtype, device=g.device)
        for dim in (g.head_dim, g.v_head_dim)
    )
    k_pages, stride = contiguous_pages(pool.key_cache)
    v_pages, _ = contiguous_pages(pool.value_cache)
    call(
        k_pages, v_pages, key, value, batch.block_table.clamp(min=0) * stride, pool.k_scale, pool.v_scale,
        batch.cu_seqlens_k, token_to_batch(batch.cu_seqlens_k), torch.zeros_like(batch.cu_seqlens_k[1:]),
        pool.k_kind != "none", g.layout, batch.total_k,
    )  # fmt: skip
    return key, value


def contiguous_pages(pool: Tensor) -> tuple[Tensor, int]:
    """A strided pool as a contiguous one: block b of the pool is page `b * stride` of the result.

    The engine's blocks have pages for K and V of several layers. The gathers before the fix take contiguous pools only.

    Raises:
        ValueError: a page is not contiguous, or the blocks are not whole pages apart.
    """
    shape, page = pool.shape[1:], math.prod(pool.shape[1:])
    if not pool[0].is_contiguous() or pool.stride(0) % page:
        raise ValueError(f"the pool has strides {list(pool.stride())}; accepted: contiguous pages, whole pages apart")
    available = pool.untyped_storage().nbytes() // pool.element_size() - pool.storage_offset()
    return pool.as_strided((available // page, *shape), (page, *pool[0].stride())), pool.stride(0) // page


def scales(value: float, guard: bool, furthest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The scales of K and V, one element each, and what follows them in memory.

    Args:
        value: of both.
        guard: True: memory that faults. False: `furthest` other floats, so that a read past the scale is silent, and
            finds the same values in every run.
        furthest: elements that the gather before the fix can reach, see `furthest_element`.
        device: of the scales.
    """
    if guard:
        return fenced(value, device), fenced(value, device)
    generator = torch.Generator().manual_seed(0)
    both = []
    for _ in range(2):
        memory = torch.rand(furthest, generator=generator) * 2 * value
        memory[0] = value
        both.append(memory.to(device)[:1])
    return both[0], both[1]


def furthest_element(num_blocks: int, page_size: int, layers: int, heads: int) -> int:
    """Elements of a scale that indexing it as `[page, head, slot]` can reach, with a margin of 64 blocks.

    Args:
        num_blocks, page_size: of the engine's cache.
        layers, heads: layers of the model, and its KV heads. A block has two pages for each layer.
    """
    return (num_blocks + 64) * 2 * layers * heads * page_size
