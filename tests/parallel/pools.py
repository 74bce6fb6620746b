"""One batch in the pools of several ranks, made of a batch in one pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kvgather as kg
from tests.attention.batches import Setup, setup

__all__ = ["distribute", "local_pool", "setup"]


def distribute(made: Setup, ranks: int, seed: int = 0) -> Tensor:
    """The block table of `ranks` pools: column c has block ids of the pool of rank c % ranks, in any order."""
    random = torch.Generator().manual_seed(seed)
    batch, columns = made.block_table.shape
    table = torch.full((batch, columns), -7, device=made.block_table.device)  # what lies past a sequence is garbage
    for rank in range(ranks):
        own = [
            (sequence, column)
            for sequence, tokens in enumerate(made.total)
            for column in range(rank, -(-tokens // made.cache.geometry.page_size), ranks)
        ]
        for (sequence, column), block in zip(
            own, torch.randperm(len(own) + 1, generator=random).tolist(), strict=False
        ):
            table[sequence, column] = block
    return table


def local_pool(made: Setup, table: Tensor, rank: int, ranks: int) -> kg.PagedKVCache:
    """A rank's pool with the pages that are in it, bit for bit those of the one pool."""
    g = made.cache.geometry
    own = table[:, rank::ranks]
    blocks = max(int(own.max()) + 1 if own.numel() else 0, 0) + 1
    kind = made.cache.k_kind
    scales: dict[str, Any] = {}
    if kind in ("per-tensor", "per-head"):
        scales = {"k_scale": made.cache.k_scale, "v_scale": made.cache.v_scale}
    pool = kg.PagedKVCache(
        blocks, g.page_size, g.num_kv_heads, g.head_dim, g.v_head_dim, layout=g.layout, dtype=g.dtype, scale=kind,
        device=g.device, **scales,
    )  # fmt: skip
    for mine, theirs in pages(made, table, rank, ranks):
        copy_page(pool, mine, made.cache, theirs)
    return pool


def pages(made: Setup, table: Tensor, rank: int, ranks: int) -> list[tuple[int, int]]:
    """(block id in the rank's pool, block id in the one pool) of all pages of a rank."""
    page = made.cache.geometry.page_size
    return [
        (int(table[sequence, column]), int(made.block_table[sequence, column]))
        for sequence, tokens in enumerate(made.total)
        for column in range(rank, -(-tokens // page), ranks)
    ]


def copy_page(to: kg.PagedKVCache, mine: int, source: kg.PagedKVCache, theirs: int) -> None:
    for ours, other in parts(to, mine, source, theirs):
        ours.copy_(other)


def parts(
    to: kg.PagedKVCache, mine: int, source: kg.PagedKVCache, theirs: int
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The bytes of a page, and its scales, in both pools."""
    pairs = [
        (_bytes(to.key_cache)[mine], _bytes(source.key_cache)[theirs]),
        (_bytes(to.value_cache)[mine], _bytes(source.value_cache)[theirs]),
    ]
    if to.k_kind in ("per-page-head", "per-token-head"):
        assert to.k_scale is not None and to.v_scale is not None
        assert source.k_scale is not None and source.v_scale is not None
        pairs += [(to.k_scale[mine], source.k_scale[theirs]), (to.v_scale[mine], source.v_scale[theirs])]
    return pairs


def _bytes(pool: Tensor) -> Tensor:
    return pool.view(torch.uint8)
