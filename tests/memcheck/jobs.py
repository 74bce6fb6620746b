"""What memcheck watches: one launch of every kernel variant, each with a comparison of what came out of it.

Gathers are the ahead-of-time list's, by plan and by the engines' call; direct attention is every tile that the
launcher can choose, in every layout, for every pool dtype and padded head dim; the other kernels follow. A job builds
its own tensors, as few as its compiled constants allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, product

import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import Built, build
from kvgather.formats.checks import dtype_name
from kvgather.formats.fp8 import FLOATS, POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from kvgather.lab.assembly import Variant
from tests.gather.oracle import assert_same
from tests.gather.variants import VARIANTS
from tests.memcheck.batch_jobs import batched, planned, refused
from tests.memcheck.direct_jobs import DIRECT, SPLITS
from tests.memcheck.hopper_jobs import HOPPER

TOKENS, BLOCKS = 700, 64


@dataclass(frozen=True)
class Job:
    """One launch, or the few that one call makes.

    Attributes:
        name: unlike any other's.
        run: launches on a device and raises AssertionError if the values are wrong.
        seconds: about how long its kernels compile.
        gigabytes: GPU memory it takes, where that is much.
    """

    name: str
    run: Callable[[str], None]
    seconds: float = 1.0
    gigabytes: float = 0.0


def smaller(variant: Variant) -> Variant:
    """The same compiled constants, strides and alignments on a GPU of NVIDIA's, over fewer blocks and rows.

    Where heads lie outside blocks, the pool's size is a stride, and stays.
    """
    case = variant.case
    blocks = case.num_blocks if variant.heads_outermost else min(case.num_blocks, BLOCKS)
    lengths = tuple(min(length, TOKENS) for length in case.lengths)  # their number is compiled for
    return replace(variant, case=replace(case, num_blocks=blocks, lengths=lengths))


def gathered(variant: Variant, device: str) -> None:
    """Gather by a plan, and compare with plain torch on a CPU."""
    case = smaller(variant).case
    if variant.heads_outermost:
        return heads_outermost(variant, device)
    built = build(case, device)
    got = built.cache.gather(built.plan, out_dtype=case.out_dtype, backend="triton")
    assert_same(got, on_cpu(built))


def gathered_for_attention(variant: Variant, device: str) -> None:
    """The same with ids outside the pool in every third column: K's rows are NaN there, and V's are 0."""
    case = smaller(variant).case
    assert len(case.lengths) == 1 and not case.starts
    built = build(case, device)
    built.block_table[0, ::3] = built.cache.geometry.num_blocks
    plan = kg.GatherPlan.build(
        built.block_table, built.cu_seqlens_k, page_size=case.page_size, num_blocks=built.cache.geometry.num_blocks,
        total_tokens=case.total_tokens,
    )  # fmt: skip
    got = built.cache.gather_for_attention(plan, case.out_dtype, backend="triton")
    k, v = on_cpu(built)
    v[torch.arange(case.total_tokens) // case.page_size % 3 == 0] = 0
    assert_same(got, (k, v))


def called(variant: Variant, device: str) -> None:
    """The engines' call over the same cache."""
    case = smaller(variant).case
    built = build(case, device)
    cache = built.cache
    rows = [
        torch.empty(case.total_tokens, case.num_heads, dim, dtype=case.out_dtype, device=device)
        for dim in (case.k_dim, case.v_dim)
    ]
    kg.cp_mha_gather_cache(
        cache.key_cache, cache.value_cache, *rows, built.block_table, cache.k_scale, cache.v_scale, built.cu_seqlens_k,
        None, built.seq_starts, True, case.layout, case.total_tokens,
    )  # fmt: skip
    assert_same((rows[0], rows[1]), on_cpu(built))


def on_cpu(built: Built) -> tuple[Tensor, Tensor]:
    """What plain torch gathers from a copy of the pools."""
    case, cache = built.case, built.cache
    copy = kg.PagedKVCache.from_tensors(
        cache.key_cache.cpu(), cache.value_cache.cpu(), layout=case.layout, k_scale=_cpu(cache.k_scale),
        v_scale=_cpu(cache.v_scale), k_kind=case.k_kind, v_kind=case.v_kind,
    )  # fmt: skip
    plan = kg.GatherPlan.build(
        built.block_table.cpu(), built.cu_seqlens_k.cpu(), page_size=case.page_size,
        num_blocks=cache.geometry.num_blocks, total_tokens=case.total_tokens, seq_starts=_cpu(built.seq_starts),
    )  # fmt: skip
    return copy.gather(plan, out_dtype=case.out_dtype, backend="torch")


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def heads_outermost(variant: Variant, device: str) -> None:
    """One tensor with a pool for each head; K and V are the same bytes, since two such pools may not fit."""
    case = smaller(variant).case
    x = 16 // case.dtype.itemsize
    assert case.layout == "SHUFFLE" and case.k_dim == case.v_dim
    memory = torch.empty(case.num_heads, case.num_blocks, case.page_size * case.k_dim, dtype=torch.uint8, device=device)
    ids = torch.randint(case.num_blocks, (-(-sum(case.lengths) // case.page_size),), device=device, dtype=torch.int32)
    memory[:, ids.long()] = torch.randint_like(memory[:, : len(ids)], 256)
    pool = memory.view(case.dtype).movedim(0, 1)
    key = pool.unflatten(2, (case.k_dim // x, case.page_size, x))
    value = pool.unflatten(2, (case.page_size // x, case.v_dim, x))
    scales = [torch.rand(1, device=device) + 0.5 for _ in "kv"]
    plan = kg.GatherPlan.build(
        ids[None], torch.tensor([0, *case.lengths], device=device), page_size=case.page_size,
        num_blocks=case.num_blocks, total_tokens=case.total_tokens,
    )  # fmt: skip
    got = kg.gather(
        key, value, plan, layout="SHUFFLE", k_scale=scales[0], v_scale=scales[1], out_dtype=case.out_dtype,
        backend="triton",
    )  # fmt: skip
    used = [part[ids.long()].cpu() for part in (key, value)]
    plan = kg.GatherPlan.build(
        torch.arange(len(ids))[None], torch.tensor([0, *case.lengths]), page_size=case.page_size, num_blocks=len(ids),
        total_tokens=case.total_tokens,
    )  # fmt: skip
    wanted = kg.gather(
        *used, plan, layout="SHUFFLE", k_scale=scales[0].cpu(), v_scale=scales[1].cpu(), out_dtype=case.out_dtype,
        backend="torch",
    )  # fmt: skip
    assert_same(got, wanted)


def _gathers() -> Iterator[Job]:
    for variant in VARIANTS:
        case = smaller(variant).case
        run = called if variant.by_table else gathered_for_attention if variant.for_attention else gathered
        large = case.num_blocks * case.num_heads * case.page_size * case.k_dim * case.dtype.itemsize / 1e9
        name = f"gather {variant.name}"
        yield Job(name, lambda device, v=variant, run=run: run(v, device), 0.5, large if large > 1 else 0.0)
        kinds = {case.k_kind, case.v_kind}
        differs = variant.heads_outermost or variant.by_table or variant.for_attention
        if not differs and "none" not in kinds and case.out_dtype in FLOATS:
            yield Job(f"call {variant.name}", lambda device, v=variant: called(v, device), 0.5)


def written(layout: str, dtype: torch.dtype, kinds: tuple[str, str], rows: torch.dtype, page: int, device: str) -> None:
    """Write rows to slots of which some are no slot, and read back with plain torch on a CPU."""
    heads, dims, blocks = 5, (80, 48), 7
    given = (("k_scale", 0.25), ("v_scale", 0.5))
    scales = {name: value for (name, value), kind in zip(given, kinds, strict=True) if kind == "per-tensor"}
    caches = [
        kg.PagedKVCache(blocks, page, heads, *dims, layout=layout, dtype=dtype, scale=kinds, device=where, **scales)
        for where in (device, "cpu")
    ]
    tokens = 40
    wide = [torch.randn(tokens, heads, 2 * dim).to(rows) for dim in dims]
    slots = torch.randperm(blocks * page)[:tokens]
    slots = torch.cat((slots, slots.new_full((tokens - len(slots),), -1)))
    slots[3::8] = -1
    past = slots.clone()
    if device == "cuda":  # a CPU says so at once
        past[5::8] = blocks * page + 9
        slots[5::8] = -1
    for cache, at in zip(caches, (past, slots), strict=True):
        where = cache.geometry.device
        backend = "triton" if cache is caches[0] else "torch"
        cache.write(*(part.to(where)[..., ::2] for part in wide), at.to(where), backend)
    assert_same(
        (caches[0].key_cache, caches[0].value_cache), (caches[1].key_cache, caches[1].value_cache)
    )  # the scales show in the codes


def _writes() -> Iterator[Job]:
    turns = zip(cycle(KINDS[1:] + KINDS[:1]), cycle(FLOATS), cycle((16, 32, 48, 64)), strict=False)
    for (layout, dtype, kind), (v_kind, rows, page) in zip(product(LAYOUTS, POOL_DTYPES, KINDS), turns, strict=False):
        name = f"write {layout} {dtype_name(dtype)} {kind}:{v_kind} of {dtype_name(rows)} page{page}"

        def run(device: str, a: tuple = (layout, dtype, (kind, v_kind), rows, page)) -> None:
            written(*a, device)

        yield Job(name, run, 0.5)


def added(dim: int, part: torch.dtype, device: str) -> None:
    """Add a partial state of strided rows, some of which saw nothing."""
    from kvgather.kernels.merge import add_state

    rows, heads = 21, 3
    out, lse = torch.randn(rows, heads, dim), torch.randn(rows, heads)
    wide, part_lse = torch.randn(rows, 2 * heads, dim).to(part), torch.randn(heads, rows).T
    lse[3], part_lse[3:5] = -torch.inf, -torch.inf
    out[3], wide[3:5] = 0, 0
    got = out.clone().to(device), lse.clone().to(device)
    add_state(*got, wide.to(device)[:, ::2], part_lse.T.contiguous().to(device).T)
    wanted = kg.merge_states(out, lse, wide[:, ::2].float(), part_lse.contiguous())
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)


def _states() -> Iterator[Job]:
    for dim, part in product((8, 64, 80, 128, 192, 256), FLOATS):
        yield Job(f"add_state {dim} of {dtype_name(part)}", lambda device, a=(dim, part): added(*a, device), 0.3)


def attended(path: str, layout: str, lengths: bool, more: dict[str, int], device: str) -> None:
    """The whole prefix path, new tokens of FP32: its dense part is plain torch, and no other library's kernel."""
    from tests.attention.batches import assert_close, setup

    made = setup(
        [3, 20, 0, 1], [70, 0, 9, 33], heads=(4, 2), dims=(32, 16), page_size=16, layout=layout,
        dtype=torch.float8_e4m3fn, device=device, spare=2,
    )  # fmt: skip
    windows = {"windows": (more["window"],)} if "window" in more else {}
    batch = made.batch(lengths, max_q=20, max_k=73, **windows)
    got = made.attend(batch, path=path, **more)
    window = {"window": more["window"]} if "window" in more else {}
    assert_close(tuple(part.cpu() for part in got), tuple(part.cpu() for part in made.wanted(**window)), made.rows)


def _batches() -> Iterator[Job]:
    whole = (torch.int32, torch.int64)
    for batch, page, dtype, starts in product((1, 20, 300), (1, 3, 16), whole, (False, True)):
        name = f"plan {batch} sequences page{page} {dtype_name(dtype)}{' starts' if starts else ''}"
        yield Job(name, lambda device, a=(batch, page, dtype, starts): planned(*a, device), 0.3)
    for batch, page, dtype in product((1, 20, 300), (1, 3, 16), whole):
        name = f"batch {batch} sequences page{page} {dtype_name(dtype)}"
        yield Job(name, lambda device, a=(batch, page, dtype): batched(*a, device), 0.5)
    for dim, dtype in product((8, 80, 128, 256), FLOATS):
        yield Job(f"refuse {dim} {dtype_name(dtype)}", lambda device, a=(dim, dtype): refused(*a, device), 0.3)


def _prefixes() -> Iterator[Job]:
    calls = ({}, {"window": 5}, {"workspace_tokens": 120}, {"workspace_tokens": 120, "window": 30})
    for (path, more, lengths), layout in zip(
        product(("gather", "direct"), calls, (True, False)), cycle(LAYOUTS), strict=False
    ):
        told = "".join(f" {name}{value}" for name, value in more.items())
        name = f"prefix {path} {layout}{told} {'lengths' if lengths else 'bounds'}"
        yield Job(name, lambda device, a=(path, layout, lengths, more): attended(*a, device), 8.0)


def distributed(layout: str, ranks: int, window: int | None, device: str) -> None:
    """The shares of all ranks over one pool, from the pages, merged by the kernel that merges ranks."""
    from kvgather.batch.share import Share
    from kvgather.parallel.exchange import Exchange
    from kvgather.parallel.states import merged
    from tests.attention.batches import assert_close, setup

    made = setup(
        [3, 20, 0, 1], [70, 0, 9, 33], heads=(4, 2), dims=(32, 16), page_size=16, layout=layout,
        dtype=torch.float8_e4m3fn, device=device, spare=2,
    )  # fmt: skip
    exchange = Exchange(Share(0, ranks), torch.device(device))
    for rank in range(ranks):
        out, lse = made.attend(made.batch(share=Share(rank, ranks)), path="direct", window=window)
        if rank == 0:
            exchange.own((out.shape[0], out.shape[1], out.shape[2]), out.dtype)
        for to, part in zip(exchange.form.view(exchange.buffers, rank), (out, lse), strict=True):
            to.copy_(part)
    sinks = torch.linspace(-1, 1, 4, device=device)
    got = merged(exchange.buffers, exchange.form, ranks, sinks, "triton")
    wanted = made.wanted(window=window, sinks=sinks)
    assert_close(tuple(part.cpu() for part in got), tuple(part.cpu() for part in wanted), made.rows)


def _ranks() -> Iterator[Job]:
    for layout, (ranks, window) in zip(cycle(LAYOUTS), product((2, 3, 5), (None, 5, 30)), strict=False):
        name = f"ranks {ranks} {layout} window {window}"
        yield Job(name, lambda device, a=(layout, ranks, window): distributed(*a, device), 8.0)


def _directs() -> Iterator[Job]:
    for direct in (*DIRECT, *SPLITS):
        heavy = torch.float32 in (direct.dtype, direct.q_dtype)
        yield Job(f"direct {direct}", direct.run, (8.0 if heavy else 1.5) + sum(direct.dims) / (16 if heavy else 256))


def _hoppers() -> Iterator[Job]:
    for hopper in HOPPER:
        yield Job(f"hopper {hopper}", hopper.run, 12.0)


JOBS: tuple[Job, ...] = (
    *_gathers(), *_writes(), *_states(), *_batches(), *_prefixes(), *_ranks(), *_directs(), *_hoppers(),
)  # fmt: skip
