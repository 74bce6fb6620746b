"""Batches for the prefix path: sequences with some tokens cached and some new, in blocks that lie anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention import choose
from kvgather.attention.batch import PrefixBatch
from kvgather.attention.reference import reference_attention
from kvgather.blocks import cu_seqlens
from kvgather.cases import AttentionCase


@dataclass
class Setup:
    """A cache that holds the cached tokens, and what is needed to add the new ones.

    Attributes:
        k, v: cached and new tokens of all sequences as they were before they went into a pool, `[n_k, heads, dim]`.
        is_new: `[n_k]` bool.
        all_slots: `[n_k]`, where each token belongs.
        new, total: lengths of each sequence.
        spare: rows of q that belong to no sequence.
    """

    cache: kg.PagedKVCache
    block_table: Tensor
    k: Tensor
    v: Tensor
    q: Tensor
    is_new: Tensor
    all_slots: Tensor
    new: list[int]
    total: list[int]
    spare: int

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        return cu_seqlens(self.new, self.cache.geometry.device), cu_seqlens(self.total, self.cache.geometry.device)

    @property
    def rows(self) -> int:
        return sum(self.new)

    def batch(self, lengths: bool = True, **more: Any) -> PrefixBatch:
        g = self.cache.geometry
        if lengths:
            more = {"seqlens_q": self.new, "seqlens_k": self.total, **more}
        totals = {"total_q": self.rows + self.spare, "total_k": sum(self.total)}
        return PrefixBatch.build(
            self.block_table, *self.offsets, page_size=g.page_size, num_blocks=g.num_blocks, **{**totals, **more}
        )

    def new_tokens(self) -> tuple[Tensor, Tensor]:
        """k_new and v_new; NaN in the rows that belong to no sequence."""
        pairs = []
        for tokens in (self.k[self.is_new], self.v[self.is_new]):
            padding = tokens.new_full((self.spare, *tokens.shape[1:]), torch.nan)
            pairs.append(torch.cat((tokens, padding)))
        return pairs[0], pairs[1]

    def attend(self, batch: PrefixBatch, **more: Any) -> tuple[Tensor, Tensor]:
        """What is under test: writes the new tokens, attends."""
        return kg.prefix_attention(self.q, *self.new_tokens(), self.cache, batch, return_lse=True, **more)

    def held(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens as the pool holds them, in FP32, once the new ones were written."""
        g = self.cache.geometry
        plan = kg.GatherPlan.build(
            self.block_table, self.offsets[1], page_size=g.page_size, num_blocks=g.num_blocks,
            total_tokens=sum(self.total),
        )  # fmt: skip
        return self.cache.gather(plan, out_dtype=torch.float32)

    def wanted(self, raw: bool = False, **more: Any) -> tuple[Tensor, Tensor]:
        """The reference, over what the pool holds, or over K and V as they were before."""
        k, v = (self.k, self.v) if raw else self.held()
        if not self.q.is_cuda:
            return reference_attention(self.q, k, v, *self.offsets, **more)
        return self._head_by_head(k, v, more.pop("sinks", None), more)

    def _head_by_head(self, k: Tensor, v: Tensor, sinks: Tensor | None, more: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The reference in an eighth of the memory: 512 rows of 64 heads take 10 GB, and processes share the GPU."""
        group = self.q.shape[1] // k.shape[1]
        parts = []
        for head in range(k.shape[1]):
            mine, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
            sink = None if sinks is None else sinks[mine]
            parts.append(reference_attention(self.q[:, mine], k[:, one], v[:, one], *self.offsets, sinks=sink, **more))
        out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return out, lse


def setup(
    new: list[int],
    cached: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    page_size: int = 4,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
    q_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spare: int = 0,
    seed: int = 0,
) -> Setup:
    """Make a batch; `cached` tokens of each sequence are in the cache, `new` ones are not.

    Args:
        heads: query heads, KV heads.
        dims: of K, of V.
        dtype: of the pool; `kind` is its scale's, by default per-tensor for FP8 and none otherwise.
        spare: rows of q beyond the batch's.
    """
    random = torch.Generator(device).manual_seed(seed)
    total = [n + c for n, c in zip(new, cached, strict=True)]
    pages = [-(-n // page_size) for n in total]
    num_blocks = sum(pages) + 2
    ids = torch.randperm(num_blocks, generator=random, device=device)
    table = torch.full((len(new), max(pages, default=0) + 1), -7, device=device)  # what lies past a sequence is garbage
    slots, is_new, used = [], [], 0
    for sequence, count in enumerate(pages):
        table[sequence, :count] = ids[used : used + count]
        position = torch.arange(total[sequence], device=device)
        slots.append(table[sequence, position // page_size] * page_size + position % page_size)
        is_new.append(position >= cached[sequence])
        used += count
    kind = kind or ("per-tensor" if dtype.itemsize == 1 else "none")
    scales = {"k_scale": 0.03, "v_scale": 0.02} if kind == "per-tensor" else {}
    cache = kg.PagedKVCache(
        num_blocks, page_size, heads[1], *dims, layout=layout, dtype=dtype, scale=kind, device=device, **scales
    )
    rows = sum(total)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    k, v, q = draw(rows, heads[1], dims[0]), draw(rows, heads[1], dims[1]), draw(sum(new) + spare, heads[0], dims[0])
    empty = torch.empty(0, dtype=torch.int64, device=device)
    all_slots, new_ones = torch.cat([empty, *slots]), torch.cat([empty.bool(), *is_new])
    made = Setup(cache, table, k.to(q_dtype), v.to(q_dtype), q.to(q_dtype), new_ones, all_slots, new, total, spare)
    cache.write(made.k[~new_ones], made.v[~new_ones], all_slots[~new_ones])
    return made


def setup_of(case: AttentionCase, device: str = "cpu", seed: int = 0) -> Setup:
    """The batch of a case of the shared table."""
    return setup(
        list(case.new), list(case.cached), heads=case.heads.counts, dims=case.heads.dims, page_size=case.page_size,
        layout=case.layout, dtype=case.dtype, kind=case.kind, q_dtype=case.q_dtype, device=device, seed=seed,
    )  # fmt: skip


def error(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / max(‖wanted‖, 1e-6·√n)."""
    least = 1e-6 * wanted.numel() ** 0.5
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=least)) if wanted.numel() else 0.0


def assert_close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], rows: int | None = None) -> None:
    """out and lse agree in the first `rows` rows, as closely as out's dtype allows; the rest is empty."""
    out, lse = (tensor[:rows] for tensor in got)
    wanted_out, wanted_lse = (tensor[:rows] for tensor in wanted)
    exact = out.dtype == torch.float32
    assert out.shape == wanted_out.shape and lse.shape == wanted_lse.shape and lse.dtype == torch.float32
    assert error(out, wanted_out) <= (1e-5 if exact else 1e-2)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5 if exact else 1e-2, atol=1e-5 if exact else 2e-2)


def gather_first(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Let the hybrid path gather so many tokens of every sequence: multiples of 1,024 otherwise."""
    monkeypatch.setattr(choose, "common_length", lambda *facts: length)


def hybrid(made: Setup, batch: kg.PrefixBatch, softmax_scale: float, sinks: Tensor | None = None) -> Any:
    """out and log-sum-exp of the hybrid path."""
    return kg.prefix_attention(
        made.q, None, None, made.cache, batch, softmax_scale, sinks, path="hybrid", return_lse=True
    )


def ways_with(workspace_tokens: int) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Every way through a batch by name: whether the host knows the lengths, and the arguments of `prefix_attention`.

    Args:
        workspace_tokens: of the gather path in pieces, where the lengths are known.
    """
    return {
        "gather": (True, {"path": "gather"}),
        "gather, bounds": (False, {"path": "gather"}),
        "gather, workspace": (True, {"path": "gather", "workspace_tokens": workspace_tokens}),
        "gather, workspace, bounds": (False, {"path": "gather", "workspace_tokens": 1999}),
        "hybrid": (True, {"path": "hybrid"}),
        "direct": (True, {"path": "direct"}),
        "direct, bounds": (False, {"path": "direct"}),
        "auto": (True, {}),
    }
