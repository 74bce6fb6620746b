"""The tensors of a gather case: pools, scales, block table, offsets and plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import PagedKVCache
from ..formats.fp8 import FORMATS, quantize
from ..formats.layout import Which, pool_shape
from ..formats.scale import kind_shape
from ..plan import GatherPlan
from .case import POOL_STYLES, Case


@dataclass(frozen=True)
class Built:
    """The tensors of a case.

    Attributes:
        case: the description.
        cache: pools and scales.
        block_table: `[batch, columns]`; the columns past a sequence's pages contain ids that no pool has.
        cu_seqlens_k: `[batch + 1]`.
        seq_starts: `[batch]`, or None.
        plan: the plan of the batch, built with `total_tokens`.
    """

    case: Case
    cache: PagedKVCache
    block_table: Tensor
    cu_seqlens_k: Tensor
    seq_starts: Tensor | None
    plan: GatherPlan


def build(case: Case, device: torch.device | str = "cpu", seed: int = 0, *, values: str = "codes") -> Built:
    """Build a case's tensors.

    Args:
        case: the description.
        device: device of all tensors.
        seed: seed of all random values.
        values: contents of the pools: "codes" for random bits, NaN and infinities included; "normal" for normally
            distributed K and V, quantized.

    Raises:
        ValueError: `values` is neither, or the layout cannot represent the case's sizes.
    """
    if values not in ("codes", "normal"):
        raise ValueError(f"values is {values!r}; accepted: codes, normal")
    device = torch.device(device)
    random = torch.Generator(device).manual_seed(seed)
    num_blocks = case.num_blocks or sum(case.pages) + 3
    key, value = empty_pools(case, num_blocks, device)
    scales = []
    for pool, kind in ((key, case.k_kind), (value, case.v_kind)):
        scales.append(_scale(case, kind, num_blocks, random, device))
        if pool.numel():
            _fill(pool, values, random)
    cache = PagedKVCache.from_tensors(
        key, value, layout=case.layout, k_scale=scales[0], v_scale=scales[1], k_kind=case.k_kind, v_kind=case.v_kind
    )
    block_table = _block_table(case, num_blocks, random, device)
    cu_seqlens = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(case.index_dtype)
    starts = torch.tensor(case.starts, dtype=case.index_dtype, device=device) if case.starts else None
    plan = GatherPlan.build(
        block_table,
        cu_seqlens,
        page_size=case.page_size,
        num_blocks=num_blocks,
        total_tokens=case.total_tokens,
        seq_starts=starts,
    )
    return Built(case, cache, block_table, cu_seqlens, starts, plan)


def empty_pools(case: Case, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialized K and V pools with the case's layout, dtype and pool style.

    Args:
        case: the description.
        num_blocks: blocks of each pool.
        device: device of the pools; "meta" allocates nothing.

    Raises:
        ValueError: the pool style is unknown, or the layout cannot represent the case's sizes.
    """
    sides: tuple[tuple[Which, int], ...] = (("key", case.k_dim), ("value", case.v_dim))
    itemsize, style = case.dtype.itemsize, case.pool_style

    def shape_of(which: Which, dim: int, heads: int = case.num_heads) -> tuple[int, ...]:
        return pool_shape(case.layout, which, num_blocks, case.page_size, heads, dim, itemsize)

    if style == "packed":
        shapes = [shape_of(*side) for side in sides]
        sizes = [torch.Size(shape[1:]).numel() for shape in shapes]
        both = torch.empty(num_blocks, sum(sizes), dtype=case.dtype, device=device)
        halves = [half.unflatten(1, shape[1:]) for half, shape in zip(both.split(sizes, 1), shapes, strict=True)]
        return halves[0], halves[1]
    pools = []
    for which, dim in sides:
        shape = shape_of(which, dim)
        if style == "contiguous":
            pool = torch.empty(shape, dtype=case.dtype, device=device)
        elif style == "sliced":
            wider = torch.empty(shape_of(which, dim, case.num_heads + 3), dtype=case.dtype, device=device)
            pool = wider.narrow(2 if case.layout == "NHD" else 1, 1, case.num_heads)
        elif style == "padded":
            flat = torch.empty(num_blocks, torch.Size(shape[1:]).numel() + 24, dtype=case.dtype, device=device)
            pool = flat[:, 8:-16].unflatten(1, shape[1:])
        elif style == "permuted":
            order = (0, 2, 1, *range(3, len(shape)))
            pool = torch.empty([shape[axis] for axis in order], dtype=case.dtype, device=device).permute(order)
        elif style == "stepped":
            pool = torch.empty((*shape[:-1], 2 * shape[-1]), dtype=case.dtype, device=device)[..., ::2]
        else:
            raise ValueError(f"pool_style is {style!r}; accepted: {', '.join(POOL_STYLES)}")
        pools.append(pool)
    return pools[0], pools[1]


def _fill(pool: Tensor, values: str, random: torch.Generator) -> None:
    """Fill a pool with random bits or quantized normal values, in parts of blocks: temporaries stay small."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[pool.element_size()]
    blocks_per_part = max(1, 2**26 // max(1, pool[0].numel()))
    for part in pool.split(blocks_per_part):
        if values == "normal":
            normal = torch.randn(part.shape, generator=random, device=pool.device)
            part.view(bits).copy_(quantize(normal * (16 if pool.dtype in FORMATS else 1), None, pool.dtype).view(bits))
        else:
            limits = torch.iinfo(bits)
            part.view(bits).copy_(
                torch.randint(limits.min, limits.max + 1, part.shape, generator=random, dtype=bits, device=pool.device)
            )


def _scale(case: Case, kind: str, num_blocks: int, random: torch.Generator, device: torch.device) -> Tensor | None:
    """Random scales between 1/8 and 8."""
    if kind == "none":
        return None
    shape = kind_shape(kind, num_blocks, case.num_heads, case.page_size) or (1,)
    return torch.exp2(torch.rand(shape, generator=random, device=device) * 6 - 3)


def _block_table(case: Case, num_blocks: int, random: torch.Generator, device: torch.device) -> Tensor:
    """Random block ids, each used once if the pool has enough blocks; invalid ids past a sequence's pages."""
    columns = max((*case.pages, 0)) + 1
    invalid = torch.tensor([-1, 2**31 - 1, -(2**31), num_blocks], dtype=torch.int64, device=device)
    table = invalid.repeat(len(case.pages) * columns // 4 + 1)[: len(case.pages) * columns].view(-1, columns)
    ids = torch.randperm(num_blocks, generator=random, device=device)
    used = 0
    for row, pages in zip(table, case.pages, strict=True):
        if used + pages > num_blocks:  # sequences share blocks, as with a common prefix
            ids, used = torch.randint(num_blocks, (max(pages, num_blocks),), generator=random, device=device), 0
        row[:pages] = ids[used : used + pages]
        used += pages
    return table.to(case.index_dtype)
