"""The calls whose results are digested: of the public interface alone, so that they outlive any module's move.

A case makes its inputs once and yields the results of every call on them. Results are `portable` where their bits are
the same on every machine: copies, casts, products of two numbers and integers are; sums of products, exp and log are
not, because torch's and NumPy's depend on the CPU's instruction set, on its threads and on BLAS. So attention and
`merge_states` are portable to no CPU, and comparable where torch, triton and the device are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import kvgather as kg
from tests.digests.inputs import covering, normal, positive, raw, shuffled

PATHS = ("gather", "direct", "hybrid", "auto")
"""Of `prefix_attention`. A path more changes no other digest."""
LAYOUTS = ("NHD", "HND", "SHUFFLE")
KINDS = ("none", "per-tensor", "per-head", "per-page-head", "per-token-head")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
Results = Iterator[tuple[str, bool, Sequence[Tensor | None]]]
"""What was called, whether its bits are portable, and the tensors that came of it."""


@dataclass(frozen=True)
class Pool:
    """What the cases of a cache have in common.

    Attributes:
        apart: every other block of a larger pool, so that blocks are not next to each other.
    """

    layout: str
    dtype: torch.dtype
    k_kind: str
    v_kind: str
    page: int
    dims: tuple[int, int]

    large = False
    """Takes a GPU: the interpreter would take minutes."""

    @property
    def name(self) -> str:
        return f"{type(self).__name__.lower()} " + "-".join(_short(getattr(self, f.name)) for f in fields(self))

    def cache(self, blocks: int, heads: int, device: str, apart: bool = False) -> kg.PagedKVCache:
        """An empty cache whose scales differ from each other."""
        cache = kg.PagedKVCache(
            blocks * (1 + apart), self.page, heads, *self.dims, layout=self.layout, dtype=self.dtype,
            scale=(self.k_kind, self.v_kind), device=device,
        )  # fmt: skip
        for side, scale in (("k", cache.k_scale), ("v", cache.v_scale)):
            if scale is not None:
                scale.copy_(positive(f"{self.name} {side} scale", *scale.shape))
        if not apart:
            return cache
        scales = [s[::2] if s is not None and s.ndim > 1 else s for s in (cache.k_scale, cache.v_scale)]
        return kg.PagedKVCache.from_tensors(
            cache.key_cache[::2], cache.value_cache[::2], layout=self.layout, k_scale=scales[0], v_scale=scales[1],
            k_kind=self.k_kind, v_kind=self.v_kind,
        )  # fmt: skip

    def table(self, tokens: Sequence[int], spare: int = 3) -> tuple[Tensor, int]:
        """A block table `[batch, columns]` for these tokens of each sequence, and the number of blocks."""
        pages = [-(-n // self.page) for n in tokens]
        ids, used = shuffled(f"{self.name} blocks", sum(pages) + spare), 0
        table = torch.full((len(pages), max(pages, default=0) + 1), -7)
        for row, count in zip(table, pages, strict=True):
            row[:count] = ids[used : used + count]
            used += count
        return table, len(ids)


@dataclass(frozen=True)
class Copy(Pool):
    """Gathers by plan, by the cache and by the engines' call, and writes.

    Attributes:
        out: dtype of the gathered rows and of the written ones; an FP8 one copies codes and writes nothing.
        batch: "plain"; "starts": gathers that begin inside a sequence, 64-bit indices; "bad": wrong ids, offsets and
            starts. Where the batch is not plain, outputs hold numbers before, and have spare rows.
    """

    out: torch.dtype
    heads: int
    apart: bool
    batch: str

    @staticmethod
    def fits(layout: str, dtype: torch.dtype, page: int, dims: tuple[int, int], **_: Any) -> bool:
        return layout != "SHUFFLE" or not (page * dtype.itemsize % 16 or dims[0] * dtype.itemsize % 16)

    def results(self, device: str, portable_alone: bool) -> Results:
        lengths, starts = ((5, 0, 9) if self.page == 1 else (19, 0, 37)), (3, 0, 18)
        index = torch.int64 if self.batch == "starts" else torch.int32
        table, blocks = self.table([n + s for n, s in zip(lengths, starts, strict=True)])
        total, spare = sum(lengths), 0 if self.batch == "plain" else 5
        begin = None if self.batch == "plain" else torch.tensor(starts)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        if self.batch == "bad":
            assert begin is not None
            table[0, 0], table[2, -2], begin[2] = -1, blocks, 18 + 2 * self.page
            offsets[2], offsets[3] = lengths[0] - 2, total + 99
        table, offsets = table.to(device, index), offsets.to(device, index)
        begin = None if begin is None else begin.to(device, index)
        cache = self.cache(blocks, self.heads, device, self.apart)
        for side, pool in (("k", cache.key_cache), ("v", cache.value_cache)):
            codes = raw(f"{self.name} {side}", pool.numel() * self.dtype.itemsize)
            pool.copy_(codes.view(self.dtype).view(pool.shape))
        plan = kg.GatherPlan.build(
            table, offsets, page_size=self.page, num_blocks=blocks, total_tokens=total + spare, seq_starts=begin
        )
        yield "plan", True, [plan.records]

        def filled() -> list[Tensor]:
            return [torch.full((total + spare, self.heads, dim), 7.0).to(device, self.out) for dim in self.dims]

        pools = cache.key_cache, cache.value_cache
        for backend in ("torch", "triton"):
            out = filled() if spare else None
            yield f"gather {backend}", True, kg.gather(
                *pools, plan, layout=self.layout, k_scale=cache.k_scale, v_scale=cache.v_scale, k_kind=self.k_kind,
                v_kind=self.v_kind, out_dtype=self.out, out=out, backend=backend,
            )  # fmt: skip
        yield "cache.gather", True, cache.gather(plan, self.out, filled() if spare else None)
        kinds, out = {self.k_kind, self.v_kind}, filled()
        if self.out in FLOATS and "per-page-head" not in kinds and (kinds == {"none"} or "none" not in kinds):
            kg.cp_mha_gather_cache(
                *pools, *out, table, cache.k_scale, cache.v_scale, offsets, None, begin, kinds != {"none"},
                self.layout, total + spare, "per-token-head" in kinds,
            )  # fmt: skip
            yield "cp_mha_gather_cache", True, out
        if self.out not in FLOATS:
            return
        for backend in ("torch", "triton"):
            cache = self.cache(blocks, self.heads, device, self.apart)
            for again in range(2):  # a second write of the same kind takes the launcher's short way
                cache.write(*self.rows(f"rows {again}", device), self.slots(again, cache, index, device), backend)
            yield f"write {backend}", True, _contents(cache)
        if self.batch == "bad" and device == "cuda":  # a CPU raises
            past = self.slots(0, cache, index, device) + cache.num_slots
            cache.write(*self.rows("rows past", device), past.where(past % 2 == 0, past - cache.num_slots))
            yield "write past the pool", False, _contents(cache)

    def rows(self, label: str, device: str) -> tuple[Tensor, Tensor]:
        """Nine rows: zeros, NaN and infinity, the largest numbers of the dtype, and others."""
        widths = [self.heads, *self.dims]
        made = normal(f"{self.name} {label}", 9, widths[0], widths[1] + widths[2]) * 3
        made[0] = 0
        made[1, :, ::5], made[1, :, 1::5] = torch.nan, -torch.inf
        made = made.to(self.out)
        made[2] *= torch.finfo(self.out).max / 32
        made = made.to(device)
        return made[..., : widths[1]], made[..., widths[1] :]  # side by side, as a fused projection's

    def slots(self, again: int, cache: kg.PagedKVCache, index: torch.dtype, device: str) -> Tensor:
        slots = shuffled(f"{self.name} slots", cache.num_slots)[9 * again : 9 * again + 9]
        slots[3] = -1
        return slots.to(device, index)


@dataclass(frozen=True)
class Attend(Pool):
    """Attention over a batch, by every path.

    Attributes:
        new, cached: tokens of each sequence.
        host: "known": lengths; "bounds": nothing, and three rows of no sequence; "bad": wrong ids, and a sequence
            longer than `max_q`.
    """

    q_dtype: torch.dtype
    heads: tuple[int, int]
    window: int | None
    sinks: bool
    workspace: int | None
    new: tuple[int, ...]
    cached: tuple[int, ...]
    host: str

    @property
    def large(self) -> bool:  # type: ignore[override]
        return sum(self.cached) > 1000

    def batch(self, table: Tensor, blocks: int, device: str) -> kg.PrefixBatch:
        total = [n + c for n, c in zip(self.new, self.cached, strict=True)]
        known: dict[str, Any] = {"seqlens_q": self.new, "seqlens_k": total} if self.host == "known" else {}
        if self.host == "bad":
            table, known = table.clone(), {"max_q": max(self.new) - 1}
            table[0, 0], table[-1, 0] = -1, blocks
        return kg.PrefixBatch.build(
            table.to(device), kg.cu_seqlens(self.new, device), kg.cu_seqlens(total, device), page_size=self.page,
            num_blocks=blocks, total_q=sum(self.new) + 3 * (self.host == "bounds"), total_k=sum(total), **known,
        )  # fmt: skip

    def results(self, device: str, portable_alone: bool) -> Results:
        total = [n + c for n, c in zip(self.new, self.cached, strict=True)]
        table, blocks = self.table(total)
        batch = self.batch(table, blocks, device)
        yield "batch", True, [batch.block_table, batch.cu_seqlens_q, batch.cu_seqlens_k, batch.slots]
        if portable_alone:
            return
        (q_heads, kv_heads), (k_dim, v_dim) = self.heads, self.dims

        def tokens(label: str, count: int, heads: int, dim: int) -> Tensor:
            return normal(f"{self.name} {label}", count, heads, dim, dtype=self.q_dtype).to(device)

        positions = [torch.arange(count) for count in self.cached]
        slots = [row[p // self.page] * self.page + p % self.page for row, p in zip(table, positions, strict=True)]
        sides = (("k", k_dim), ("v", v_dim))
        old = [tokens(f"cached {side}", sum(self.cached), kv_heads, dim) for side, dim in sides]
        new = [tokens(f"new {side}", batch.total_q, kv_heads, dim) for side, dim in sides]
        q = tokens("q", batch.total_q, q_heads, k_dim)
        sinks = normal(f"{self.name} sinks", q_heads).to(device) if self.sinks else None
        for path in PATHS:
            cache = self.cache(blocks, kv_heads, device)
            cache.write(*old, torch.cat(slots).to(device))
            out, lse = kg.prefix_attention(
                q, *new, cache, self.batch(table, blocks, device), sinks=sinks, window=self.window,
                workspace_tokens=self.workspace, path=path, return_lse=True,
            )  # fmt: skip
            yield path, False, [out, lse, *_contents(cache)]


@dataclass(frozen=True)
class Merge:
    """`merge_states` over rows that saw nothing on one side, on both, or NaN."""

    a: torch.dtype
    b: torch.dtype

    large = False

    @property
    def name(self) -> str:
        return f"merge {_short(self.a)}-{_short(self.b)}"

    def results(self, device: str, portable_alone: bool) -> Results:
        if portable_alone:
            return
        parts = []
        for side, dtype in (("a", self.a), ("b", self.b)):
            out, lse = normal(f"{self.name} {side}", 12, 3, 40), 5 * normal(f"{self.name} {side} lse", 12, 3)
            lse[(2, 3, 4) if side == "a" else (3, 4, 5), :] = -torch.inf
            lse[6 if side == "a" else 7], out[8, 0, 3] = torch.inf, torch.nan
            parts += [out.to(device, dtype), lse.to(device)]
        yield "merge_states", False, kg.merge_states(*parts)


def _contents(cache: kg.PagedKVCache) -> list[Tensor | None]:
    return [cache.key_cache, cache.value_cache, cache.k_scale, cache.v_scale]


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ":".join(map(_short, value))
    return str(value).removeprefix("torch.").removeprefix("float8_")


_POOL = {"layout": LAYOUTS, "dtype": (*FP8, *FLOATS), "k_kind": KINDS, "v_kind": KINDS, "page": (1, 16, 64)}
_COPIES = covering(
    "copies",
    _POOL | {
        "dims": ((16, 16), (40, 24), (192, 128), (64, 64)), "out": FLOATS, "heads": (1, 2, 5), "apart": (False, True),
        "batch": ("plain", "starts", "bad"),
    },
    Copy.fits,
)  # fmt: skip
_BITS = [
    Copy(layout, dtype, "none", "none", 16, (64, 32), dtype, 2, False, batch)
    for layout, dtype, batch in zip(LAYOUTS, FP8, ("plain", "starts", "bad"), strict=True)
]
_MIXES = (
    ((5, 1, 0, 2), (14, 33, 4, 0), "known"),
    ((1, 1, 1), (32, 0, 70), "bounds"),
    ((40, 7), (13, 64), "known"),
    ((3, 9, 2), (30, 21, 17), "bad"),
)
_CHOICES = covering(
    "attends",
    _POOL | {
        "dims": ((16, 16), (48, 32), (192, 128), (64, 64)), "q_dtype": FLOATS, "heads": ((4, 2), (5, 1), (3, 3)),
        "window": (None, 1, 12), "sinks": (False, True), "workspace": (None, 48), "mix": _MIXES,
    },
    Copy.fits,
)  # fmt: skip
_ATTENDS = [(choice, choice.pop("mix")) for choice in _CHOICES]
_E4M3, _BF16 = torch.float8_e4m3fn, torch.bfloat16
_TWO = ((32, 5), (1500, 800))
_MODELS = [
    Attend(layout, _E4M3, kind, kind, 16, (dim, dim), _BF16, heads, None, True, None, (new,) * 4, cached, "known")
    for heads, dim in (((64, 8), 64), ((32, 8), 128))
    for new, cached in ((1, (2000, 37, 900, 1500)), (16, (2000, 37, 900, 1500)), (128, (1025, 2048, 1100, 1500)))
    for layout, kind in (("NHD", "per-tensor"), ("SHUFFLE", "per-token-head"))
] + [
    Attend(layout, dtype, kind, kind, page, dims, q_dtype, heads, window, True, workspace, *_TWO, host)
    for layout, dtype, kind, page, dims, q_dtype, heads, window, workspace, host in (
        ("HND", _E4M3, "per-head", 64, (192, 128), _BF16, (64, 4), 128, None, "bounds"),
        ("NHD", torch.float8_e5m2, "per-tensor", 1, (80, 80), _BF16, (5, 1), None, 700, "known"),
        ("SHUFFLE", _BF16, "none", 16, (256, 256), _BF16, (16, 2), None, None, "bounds"),
        ("HND", torch.float32, "none", 16, (128, 128), torch.float32, (8, 8), None, 1000, "known"),
    )
]  # fmt: skip
"""What models have, with keys enough for every processor: only a GPU is fast enough."""

Case = Copy | Attend | Merge
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *_MODELS,
        *(Attend(**choice, new=new, cached=cached, host=host) for choice, (new, cached, host) in _ATTENDS),
        *(Copy(**choice) for choice in _COPIES),
        *_BITS,
        *(Merge(a, b) for a in FLOATS for b in FLOATS),
    )
}
"""By name, those that take longest first."""
