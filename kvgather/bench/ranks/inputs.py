"""A context in the pools of all ranks, and whole in rank 0's for comparison: the same bytes, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...batch.share import Share
from ...cache import PagedKVCache
from ...cases.context import ContextCase
from ..runner import copies_for

PAGES_AT_ONCE = 8192
"""Pages whose numbers are drawn in one step: 0.5 GB in FP32."""
CODES, SCALE = 16.0, 1 / 16
"""The standard deviation of the codes, far below the largest code, 448; scaled, K and V are standard normal."""


@dataclass(frozen=True)
class Pools:
    """One context, for all cases that have it.

    Attributes:
        table: `[1, columns]` int32: column c has a block id of the pool of rank c % ranks.
        own: this rank's pool, as often as is needed to exceed the GPU's last cache.
        whole_table, whole: the block table and the pool of the whole context, as often; None on other ranks than 0.
    """

    table: Tensor
    own: list[PagedKVCache]
    whole_table: Tensor | None
    whole: list[PagedKVCache] | None


def check_memory(context: int, most_new: int, device: torch.device) -> None:
    """Check that rank 0's GPU has memory for the whole context, with which the ranks are compared.

    Raises:
        ValueError: it has not; on all ranks.
    """
    if device.type == "cpu":
        return
    # The whole, and on a path that gathers its rows in BF16, for eager calls and again in a graph; likewise this rank's
    # share, in a second graph for its local attention; and 2 GiB for what is drawn in a step, and the outputs.
    whole = (context + most_new) * ContextCase.token_bytes()
    needed = (1 + 2 + 2) * whole + (1 + 2 + 2 + 2) * whole // dist.get_world_size() + 2 * 2**30
    free = torch.tensor([torch.cuda.mem_get_info(device)[0]], device=device)
    dist.broadcast(free, 0)
    if (had := int(free)) < needed:
        raise ValueError(
            f"--contexts has {context:,} tokens, and one GPU alone needs about {needed / 2**30:.0f} GiB for them; "
            f"accepted: what fits in {had / 2**30:.0f} GiB"
        )


def build_pools(context: int, most_new: int, share: Share, device: torch.device, seed: int = 0) -> Pools:
    """Draw a context: blocks in random order, K and V normally distributed before they become codes.

    Args:
        context: cached tokens.
        most_new: how many new tokens the pools have room for.
        share: this rank's.
        device: this rank's.
        seed: of all random values; the same on all ranks.
    """
    columns = -(-(context + most_new) // ContextCase.PAGE)
    random = torch.Generator().manual_seed(seed)
    table = torch.empty(columns, dtype=torch.int32)
    for rank in range(share.ranks):
        ids = torch.randperm(len(range(rank, columns, share.ranks)), generator=random)
        table[rank :: share.ranks] = ids.int()
    whole_table = torch.randperm(columns, generator=random).int().to(device)
    table = table.to(device)
    own = _pool(-(-columns // share.ranks), device)  # as many blocks on every rank
    whole = _pool(columns, device) if share.rank == 0 else None
    for first, codes in _pages(columns, device, seed):
        step = torch.arange(first, first + len(codes), device=device)
        held = step % share.ranks == share.rank
        _put(own, table[step[held]], codes[held])
        if whole is not None:
            _put(whole, whole_table[step], codes)
    return Pools(
        table[None], _copies(own), whole_table[None] if whole is not None else None,
        _copies(whole) if whole is not None else None,
    )  # fmt: skip


def _pages(columns: int, device: torch.device, seed: int) -> Iterator[tuple[int, Tensor]]:
    """The codes of all pages as bytes, `[pages, 2, page, heads, dim]`, and the first page's column, step by step.

    Every rank draws all pages on its device and keeps its own; equal devices draw equal numbers.
    """
    random = torch.Generator(device).manual_seed(seed)
    for first in range(0, columns, PAGES_AT_ONCE):
        shape = min(PAGES_AT_ONCE, columns - first), 2, ContextCase.PAGE, ContextCase.KV_HEADS, ContextCase.HEAD_DIM
        numbers = torch.randn(shape, generator=random, device=device).mul_(CODES)
        yield first, numbers.to(torch.float8_e4m3fn).view(torch.uint8)


def _pool(blocks: int, device: torch.device) -> PagedKVCache:
    return PagedKVCache(
        blocks, ContextCase.PAGE, ContextCase.KV_HEADS, ContextCase.HEAD_DIM, layout="NHD", scale="per-tensor",
        k_scale=SCALE, v_scale=SCALE, device=device,
    )  # fmt: skip


def _put(pool: PagedKVCache, ids: Tensor, codes: Tensor) -> None:
    pool.key_cache.view(torch.uint8)[ids.long()] = codes[:, 0]
    pool.value_cache.view(torch.uint8)[ids.long()] = codes[:, 1]


def _copies(pool: PagedKVCache) -> list[PagedKVCache]:
    g = pool.geometry
    size = g.num_blocks * g.page_size * ContextCase.token_bytes()
    pools = [pool]
    for _ in range(copies_for(size, g.device) - 1):
        copy = _pool(g.num_blocks, g.device)
        copy.key_cache.copy_(pool.key_cache)
        copy.value_cache.copy_(pool.value_cache)
        pools.append(copy)
    return pools


def new_rows(case: ContextCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q `[new, q_heads, head_dim]`, k_new and v_new `[new, kv_heads, head_dim]` in BF16; rank 0's on all ranks."""
    random = torch.Generator(device).manual_seed(case.new)
    rows = []
    for heads in (case.Q_HEADS, case.KV_HEADS, case.KV_HEADS):
        drawn = torch.randn((case.new, heads, case.HEAD_DIM), generator=random, device=device).bfloat16()
        dist.broadcast(drawn, 0)
        rows.append(drawn)
    return rows[0], rows[1], rows[2]
