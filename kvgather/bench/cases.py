"""The shared table of cases: layouts × scale kinds × dtypes × shapes, and how to build each.

Tests run the small ones against the reference; benchmarks run the large ones, whose correctness is checked in the same
run. A case is a description; `build` makes its tensors from a seed, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cache import PagedKVCache
from ..formats.checks import dtype_name
from ..formats.fp8 import FLOATS, FORMATS, POOL_DTYPES, quantize
from ..formats.layout import LAYOUTS, Which, group, pool_shape
from ..formats.scale import KINDS, kind_shape
from ..plan import GatherPlan

POOL_STYLES = ("contiguous", "sliced", "padded", "packed", "permuted", "stepped")
"""How a pool lies in memory: alone; some heads of a pool with more; blocks with gaps between them; K and V of a block
side by side in one allocation; its axes in another order (HND over NHD's memory, NHD over HND's); every other element.
"""


@dataclass(frozen=True)
class Case:
    """One cache and one batch to gather from it.

    Attributes:
        layout, dtype, k_kind, v_kind: of the cache.
        out_dtype: of the gathered rows.
        page_size, num_heads, k_dim, v_dim: the geometry.
        lengths: tokens to gather of each sequence.
        starts: position at which the gather of each sequence begins; empty is 0 for all.
        spare_rows: rows of the output beyond the batch's tokens.
        num_blocks: blocks of the pool; 0 is as many as the batch needs and three more.
        pool_style: one of `POOL_STYLES`.
        index_dtype: of the block table, the offsets and the starts.
    """

    layout: str = "NHD"
    dtype: torch.dtype = torch.float8_e4m3fn
    k_kind: str = "per-tensor"
    v_kind: str = "per-tensor"
    out_dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    num_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    lengths: tuple[int, ...] = (19,)
    starts: tuple[int, ...] = (3,)
    spare_rows: int = 0
    num_blocks: int = 0
    pool_style: str = "contiguous"
    index_dtype: torch.dtype = torch.int32

    @property
    def name(self) -> str:
        """What tells this case from the others, in a form that a shell and a CSV file can hold."""
        dims = f"{self.k_dim}" if self.k_dim == self.v_dim else f"{self.k_dim}:{self.v_dim}"
        kinds = self.k_kind if self.k_kind == self.v_kind else f"{self.k_kind}:{self.v_kind}"
        parts = [
            self.layout,
            f"{self.num_heads}x{dims}",
            f"page{self.page_size}",
            f"{dtype_name(self.dtype).removeprefix('float8_')}>{dtype_name(self.out_dtype).removeprefix('float8_')}",
            kinds,
            f"{len(self.lengths)}seqs{sum(self.lengths)}",
        ]
        parts += ["chunk"] if any(self.starts) else []
        parts += [f"spare{self.spare_rows}"] if self.spare_rows else []
        parts += [self.pool_style] if self.pool_style != "contiguous" else []
        parts += ["int64"] if self.index_dtype == torch.int64 else []
        return "-".join(parts)

    @property
    def pages(self) -> tuple[int, ...]:
        """Blocks that each sequence's positions reach, those before its start included."""
        starts = self.starts or (0,) * len(self.lengths)
        return tuple(
            -(-(start + length) // self.page_size) if length else 0
            for start, length in zip(starts, self.lengths, strict=True)
        )

    @property
    def total_tokens(self) -> int:
        return sum(self.lengths) + self.spare_rows


@dataclass(frozen=True)
class Built:
    """The tensors of a case.

    Attributes:
        case: what they were built from.
        cache: the pools and scales.
        block_table: `[batch, columns]`; what lies past a sequence's pages is garbage.
        cu_seqlens_k: `[batch + 1]`.
        seq_starts: `[batch]`, or None.
        plan: built from them, with `total_tokens` given.
    """

    case: Case
    cache: PagedKVCache
    block_table: Tensor
    cu_seqlens_k: Tensor
    seq_starts: Tensor | None
    plan: GatherPlan


def build(case: Case, device: torch.device | str = "cpu", seed: int = 0, *, values: str = "codes") -> Built:
    """Make a case's tensors.

    Args:
        case: which.
        device: where.
        seed: of everything random.
        values: what fills the pools: "codes", any bits, NaN and infinities among them; or "normal", normally
            distributed K and V, quantized.

    Raises:
        ValueError: `values` is neither, or the case's sizes do not fit its layout.
    """
    if values not in ("codes", "normal"):
        raise ValueError(f"values is {values!r}; accepted: codes, normal")
    where = torch.device(device)
    random = torch.Generator(where).manual_seed(seed)
    blocks = case.num_blocks or sum(case.pages) + 3
    key, value = _pools(case, blocks, where)
    scales = []
    for pool, kind in ((key, case.k_kind), (value, case.v_kind)):
        scale = _scale(case, kind, blocks, random, where)
        scales.append(scale)
        if pool.numel():
            _fill(pool, values, random)
    cache = PagedKVCache.from_tensors(
        key, value, layout=case.layout, k_scale=scales[0], v_scale=scales[1], k_kind=case.k_kind, v_kind=case.v_kind
    )
    table = _block_table(case, blocks, random, where)
    cu_seqlens = torch.tensor([0, *case.lengths], device=where).cumsum(0).to(case.index_dtype)
    starts = torch.tensor(case.starts, dtype=case.index_dtype, device=where) if case.starts else None
    plan = GatherPlan.build(
        table,
        cu_seqlens,
        page_size=case.page_size,
        num_blocks=blocks,
        total_tokens=case.total_tokens,
        seq_starts=starts,
    )
    return Built(case, cache, table, cu_seqlens, starts, plan)


def _pools(case: Case, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty K and V pools that lie in memory as the case says."""
    sides: tuple[tuple[Which, int], ...] = (("key", case.k_dim), ("value", case.v_dim))
    itemsize, style = case.dtype.itemsize, case.pool_style

    def shape_of(which: Which, dim: int, heads: int = case.num_heads) -> tuple[int, ...]:
        return pool_shape(case.layout, which, blocks, case.page_size, heads, dim, itemsize)

    if style == "packed":
        shapes = [shape_of(*side) for side in sides]
        sizes = [torch.Size(shape[1:]).numel() for shape in shapes]
        both = torch.empty(blocks, sum(sizes), dtype=case.dtype, device=device)
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
            flat = torch.empty(blocks, torch.Size(shape[1:]).numel() + 24, dtype=case.dtype, device=device)
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
    """Random bits, or quantized normal values, block by block so that a large pool needs little beside itself."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[pool.element_size()]
    step = max(1, 2**26 // max(1, pool[0].numel()))
    for part in pool.split(step):
        if values == "normal":
            drawn = torch.randn(part.shape, generator=random, device=pool.device)
            part.view(bits).copy_(quantize(drawn * (16 if pool.dtype in FORMATS else 1), None, pool.dtype).view(bits))
        else:
            limits = torch.iinfo(bits)
            part.view(bits).copy_(
                torch.randint(limits.min, limits.max + 1, part.shape, generator=random, dtype=bits, device=pool.device)
            )


def _scale(case: Case, kind: str, blocks: int, random: torch.Generator, device: torch.device) -> Tensor | None:
    """Scales between 1/8 and 8, no two alike."""
    if kind == "none":
        return None
    shape = kind_shape(kind, blocks, case.num_heads, case.page_size) or (1,)
    return torch.exp2(torch.rand(shape, generator=random, device=device) * 6 - 3)


def _block_table(case: Case, blocks: int, random: torch.Generator, device: torch.device) -> Tensor:
    """Random ids, each once where there are enough blocks; past a sequence's pages, ids that no pool has."""
    columns = max((*case.pages, 0)) + 1
    tail = torch.tensor([-1, 2**31 - 1, -(2**31), blocks], dtype=torch.int64, device=device)
    table = tail.repeat(len(case.pages) * columns // 4 + 1)[: len(case.pages) * columns].view(-1, columns)
    ids = torch.randperm(blocks, generator=random, device=device)
    used = 0
    for row, pages in zip(table, case.pages, strict=True):
        if used + pages > blocks:  # sequences that share blocks, as a common prefix does
            ids, used = torch.randint(blocks, (max(pages, blocks),), generator=random, device=device), 0
        row[:pages] = ids[used : used + pages]
        used += pages
    return table.to(case.index_dtype)


def _fits(case: Case) -> bool:
    """Whether SHUFFLE's groups of 16 bytes divide the case's sizes."""
    x = group(case.dtype.itemsize)
    return case.layout != "SHUFFLE" or (case.k_dim % x == 0 and case.page_size % x == 0)


SHAPES = (
    {"page_size": 1, "num_heads": 1, "k_dim": 8, "v_dim": 8, "lengths": (3, 2), "starts": ()},
    {"page_size": 7, "num_heads": 3, "k_dim": 40, "v_dim": 24, "lengths": (9,), "starts": (4,)},
    {"page_size": 16, "num_heads": 1, "k_dim": 64, "v_dim": 64, "lengths": (33,), "starts": ()},
    {"page_size": 16, "num_heads": 9, "k_dim": 16, "v_dim": 16, "lengths": (1, 15), "starts": (15, 1)},
    {"page_size": 16, "num_heads": 5, "k_dim": 80, "v_dim": 80, "lengths": (17,), "starts": ()},
    {"page_size": 16, "num_heads": 3, "k_dim": 192, "v_dim": 128, "lengths": (20,), "starts": (8,)},
    {"page_size": 16, "num_heads": 7, "k_dim": 64, "v_dim": 72, "lengths": (4,), "starts": ()},
    {"page_size": 24, "num_heads": 2, "k_dim": 48, "v_dim": 8, "lengths": (30,), "starts": (23,)},
    {"page_size": 32, "num_heads": 6, "k_dim": 96, "v_dim": 96, "lengths": (5, 0, 0, 2), "starts": (30, 9, 64, 1)},
    {"page_size": 48, "num_heads": 4, "k_dim": 112, "v_dim": 16, "lengths": (50,), "starts": (47,)},
    {"page_size": 64, "num_heads": 8, "k_dim": 64, "v_dim": 64, "lengths": (70,), "starts": ()},
    {"page_size": 128, "num_heads": 2, "k_dim": 128, "v_dim": 128, "lengths": (40,), "starts": (100,)},
    {"page_size": 256, "num_heads": 1, "k_dim": 256, "v_dim": 256, "lengths": (5,), "starts": (254,)},
)
"""Geometries and batches that are awkward in one way each: odd head counts, pages and dims that are no powers of two,
one token, a start in the last slot of a page, empty sequences."""


def _small() -> Iterator[Case]:
    base, count = Case(), len(KINDS)
    for nth, layout in enumerate(LAYOUTS):
        here = replace(base, layout=layout)
        for i, k_kind in enumerate(KINDS):
            for j, v_kind in enumerate(KINDS):
                if layout == "SHUFFLE" or (j - i) % count == 2:
                    yield replace(here, k_kind=k_kind, v_kind=v_kind)
        for i, dtype in enumerate(POOL_DTYPES):  # over the three layouts each dtype meets every kind
            k_kind, v_kind = KINDS[(i + 2 * nth) % count], KINDS[(i + 2 * nth + 1) % count]
            yield replace(here, dtype=dtype, k_kind=k_kind, v_kind=v_kind, out_dtype=FLOATS[(i + nth) % 3])
            yield replace(here, dtype=dtype, k_kind="none", v_kind="none", out_dtype=dtype)  # bits as they are
        for shape in SHAPES:
            case = replace(here, k_kind="per-token-head", **shape)  # type: ignore[arg-type]
            yield case if _fits(case) else replace(case, dtype=torch.float16, v_kind="per-page-head")
        for style in POOL_STYLES[1:]:
            yield replace(here, pool_style=style, v_kind="per-token-head")
            yield replace(here, pool_style=style, dtype=torch.bfloat16, k_dim=24, k_kind="per-head", v_kind="none")
        yield replace(here, spare_rows=21)
        yield replace(here, index_dtype=torch.int64)
        yield replace(here, lengths=(), starts=())
        yield replace(here, lengths=(19, 0, 5), starts=(3, 0, 16))
        yield replace(here, lengths=(20, 20), starts=(), num_blocks=2)  # sequences that share blocks
        yield replace(here, lengths=(16, 32), starts=(16, 0), dtype=POOL_DTYPES[nth], v_kind="none")  # full pages alone


SMALL: tuple[Case, ...] = tuple(dict.fromkeys(case for case in _small() if _fits(case)))
"""Cases small enough for Triton's interpreter: every pair of scale kinds, every dtype with every kind and as bare bits,
every awkward shape, every way a pool can lie in memory, in every layout that can hold them."""
