"""The Hopper kernel beside its twin, the direct kernel, and beside the formula in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention.batch import PrefixBatch
from kvgather.blocks import cu_seqlens
from kvgather.cases import sinks_of
from kvgather.hopper import plan
from tests.attention.batches import Setup, error
from tests.attention.direct_cases import filled
from tests.attention.test_direct import assert_spare_rows_are_empty

GPU = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not plan.available(GPU),
        reason="needs a GPU of compute capability 9.0, and Triton 3.6",
    ),
]
WORST = 5e-3
"""Relative error against float64."""
PER_TENSOR, NONE = "per-tensor", "none"


@dataclass(frozen=True)
class Case:
    """What the kernel is compiled for: the form for many rows if `long`, else that for few."""

    dim: int
    heads: tuple[int, int]
    page_size: int = 16
    kinds: tuple[str, str] = (PER_TENSOR, PER_TENSOR)
    q_dtype: torch.dtype = torch.bfloat16
    sinks: str = "off"
    long: bool = True

    def __str__(self) -> str:
        scales = self.kinds[0] if self.kinds[0] == self.kinds[1] else ":".join(self.kinds)
        return (
            f"{self.heads[0]}/{self.heads[1]}x{self.dim}-page{self.page_size}-{scales}-"
            f"{str(self.q_dtype).split('.')[1]}-sinks {self.sinks}-{'long' if self.long else 'short'}"
        )

    @property
    def tokens(self) -> int:
        """New tokens of the most rows that `plan.FEW` serves, or a few less."""
        return plan.FEW[self.dim].rows // (self.heads[0] // self.heads[1])

    def made(self, new: list[int], cached: list[int], seed: int = 0, spare: int = 3) -> Setup:
        return filled(
            new, cached, self.kinds, heads=self.heads, dims=(self.dim, self.dim), page_size=self.page_size,
            dtype=torch.float8_e4m3fn, q_dtype=self.q_dtype, device="cuda", spare=spare, seed=seed,
        )  # fmt: skip

    def batches(self) -> list[tuple[list[int], list[int]]]:
        """New and cached tokens: rows and keys on both sides of a tile's bounds, and drawn ones."""
        r, drawn = self.tokens, random.Random(self.dim + self.page_size)
        mixes = [
            ([r, 0, 1, r // 2 + 1, r // 2], [300, 40, 900, 0, 128]),
            ([r, r, r - 1], [0, 127, 129]),
            ([r], [4000]),
        ]
        most = r
        if self.long:
            mixes += [([3 * r + 1, 1, 0, r, 2 * r - 1], [1000, 0, 5, 257, 64]), ([5 * r, 7], [2000, 2049])]
            mixes += [([2 * r, 2 * r - 1], [300, 129]), ([2 * r + 1], [500])]
            most = 4 * r
        for _ in range(4):
            count = drawn.randint(1, 7)
            new = [r, *(drawn.choice((0, 1, drawn.randint(1, most))) for _ in range(count))]
            mixes.append((new, [drawn.choice((0, drawn.randint(0, 40), drawn.randint(0, 1500))) for _ in new]))
        return mixes


CASES = (
    Case(64, (64, 8)),
    Case(64, (64, 8), long=False),
    Case(64, (16, 2), 48, (NONE, NONE), torch.float16, "on"),
    Case(64, (6, 2), 64, (PER_TENSOR, NONE), sinks="on", long=False),
    Case(128, (32, 8)),
    Case(128, (5, 1), 16, (NONE, PER_TENSOR), torch.float16),
    Case(128, (8, 2), 128, sinks="very large"),
    Case(128, (8, 1), 32, sinks="on"),
    Case(128, (32, 8), long=False),
    Case(128, (5, 1), 48, (PER_TENSOR, NONE), torch.float16, "on", long=False),
    Case(64, (32, 1), 16, (NONE, PER_TENSOR), long=False),
)
BASES = CASES[0], CASES[1], CASES[4], CASES[8]
"""A case for each form of the kernel."""


def attend(made: Setup, batch: PrefixBatch | None = None, hopper: bool = True, **more: Any) -> tuple[Tensor, Tensor]:
    """The kernel, or its twin."""
    from kvgather.attention.direct import direct_attention

    batch = batch or made.batch()
    q, cache = more.pop("q", made.q), more.pop("cache", made.cache)
    if hopper:
        form = plan.chosen_form(cache, batch, *q.shape[:2], q.dtype, None, cache.likeness, True)
        assert form is not None, "the Hopper kernel does not run"
    scale = cache.geometry.head_dim**-0.5
    out, lse = direct_attention(q, cache, batch, softmax_scale=scale, hopper=hopper, **more)
    assert lse is not None
    return out, lse


def assert_alike(got: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Equal but for rounding; NaN, −inf and 0 in the same places."""
    for ours, theirs in zip(got, other, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
        used = theirs.isfinite()
        assert error(ours[used], theirs[used].double()) <= WORST
    torch.testing.assert_close(got[1], other[1], rtol=2e-3, atol=2e-3, equal_nan=True)
    empty = other[1].isinf() | other[0].eq(0).all(-1)
    assert got[0][empty].eq(0).all()


def assert_right(made: Setup, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], seen: Tensor) -> None:
    """The formula's values in the rows `seen` of the batch's."""
    out, lse, wanted_out, wanted_lse = (part[: made.rows][seen] for part in (*got, *wanted))
    assert error(out, wanted_out) <= WORST
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_batches(case: Case) -> None:
    sinks = sinks_of(case.sinks, case.heads[0], "cuda")
    for seed, (new, cached) in enumerate(case.batches()):
        made = case.made(new, cached, seed)
        batch = made.batch()
        got = attend(made, batch, sinks=sinks)
        again = attend(made, batch, sinks=sinks)  # launched from addresses alone
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), (new, cached)
        assert_alike(got, attend(made, batch, hopper=False, sinks=sinks))
        everything = torch.ones(made.rows, dtype=torch.bool, device="cuda")
        assert_right(made, got, made.wanted(sinks=sinks), everything)
        assert_spare_rows_are_empty(made, got, sinks)


@pytest.mark.parametrize("case", BASES, ids=str)
@pytest.mark.parametrize("sinks", ["off", "on"])
def test_rows_that_see_a_bad_block_are_nan_and_no_others(case: Case, sinks: str) -> None:
    """Block 0, which is read in place of a bad one, is all NaN."""
    sink = sinks_of(sinks, case.heads[0], "cuda")
    r, page = case.tokens, case.page_size
    most = 3 * r if case.long else r
    for column in (0, 1, 7, 8, 20, 37, 62):
        new, cached = [most, 1, r, 2], [1000, 500, 0, 70]
        made = case.made(new, cached, column)
        wanted = made.wanted(sinks=sink)
        first_bad = [math.inf] * len(new)
        table = made.block_table
        for sequence, total in enumerate(made.total):
            pages = -(-total // page)
            bad = {column} if column < pages and sequence != 1 else set()
            bad |= {at for at in range(pages) if int(table[sequence, at]) == 0}
            for at in bad:
                table[sequence, at] = (-1, made.cache.geometry.num_blocks, -(2**31))[at % 3]
                first_bad[sequence] = min(first_bad[sequence], at * page)
        for pool in (made.cache.key_cache, made.cache.value_cache):
            pool[0].view(torch.uint8).fill_(0x7F)  # NaN
        batch = made.batch()
        got = attend(made, batch, sinks=sink)
        position = [c + i for n, c in zip(new, cached, strict=True) for i in range(n)]
        bound = [bad for n, bad in zip(new, first_bad, strict=True) for _ in range(n)]
        seen = torch.tensor([at < bad for at, bad in zip(position, bound, strict=True)], device="cuda")
        assert got[0][: made.rows][~seen].isnan().all() and got[1][: made.rows][~seen].isnan().all()
        assert_right(made, got, wanted, seen)
        assert_spare_rows_are_empty(made, got, sink)
        assert_alike(got, attend(made, batch, hopper=False, sinks=sink))


@pytest.mark.parametrize("case", BASES, ids=str)
def test_a_sequence_with_more_tokens_than_max_q_is_nan(case: Case) -> None:
    r = case.tokens
    made = case.made([2, r + 9, 0, r], [14, 333, 5, 200])
    batch = made.batch(lengths=False, max_q=r)
    got = attend(made, batch)
    refused = torch.zeros(made.rows, dtype=torch.bool, device="cuda")
    refused[2 : 2 + r + 9] = True
    assert got[0][: made.rows][refused].isnan().all() and got[1][: made.rows][refused].isnan().all()
    assert_right(made, got, made.wanted(), ~refused)
    assert_spare_rows_are_empty(made, got)
    assert_alike(got, attend(made, batch, hopper=False))


@pytest.mark.parametrize("case", BASES, ids=str)
def test_keys_past_the_block_table_and_fewer_keys_than_rows(case: Case) -> None:
    """Offsets on the device that the host does not know: no keys, fewer keys than new tokens, more than pages."""
    r = case.tokens
    made = case.made([r, r, r, r], [600, 600, 600, 600])
    g = made.cache.geometry
    columns = made.block_table.shape[1]
    lengths = [0, r // 3, 600, (columns * case.page_size) + r // 2]
    batch = PrefixBatch.build(
        made.block_table, made.offsets[0], cu_seqlens(lengths, "cuda"), page_size=case.page_size,
        num_blocks=g.num_blocks, total_q=made.rows + made.spare, total_k=sum(lengths), max_q=r, max_k=max(lengths),
    )  # fmt: skip
    for sinks in (None, sinks_of("on", case.heads[0], "cuda")):
        got = attend(made, batch, sinks=sinks)
        assert_alike(got, attend(made, batch, hopper=False, sinks=sinks))
        assert got[0][:r].eq(0).all() and got[0][-made.spare :].eq(0).all()
        assert got[0][3 * r : 4 * r].isnan().any() and not got[0][2 * r : 3 * r].isnan().any()


@pytest.mark.parametrize("case", BASES, ids=str)
def test_strided_rows_and_pools(case: Case) -> None:
    """Rows of q with strides of their own; K and V in one allocation, block by block, behind a gap."""
    r, (q_heads, kv_heads) = case.tokens, case.heads
    made = case.made([r, 1, r], [700, 5, 90])
    g, n = made.cache.geometry, len(made.q)
    wide = torch.randn(n, 2 * q_heads + 1, case.dim, device="cuda").to(case.q_dtype)
    memory = torch.zeros(g.num_blocks, 2, case.page_size, kv_heads + 1, case.dim, dtype=torch.uint8, device="cuda")
    memory = memory.view(g.dtype)
    pools = memory[:, 0, :, 1:], memory[:, 1, :, 1:]
    for pool, source in zip(pools, (made.cache.key_cache, made.cache.value_cache), strict=True):
        pool.view(torch.uint8).copy_(source.view(torch.uint8))
    cache = kg.PagedKVCache.from_tensors(
        *pools, layout="NHD", k_scale=made.cache.k_scale, v_scale=made.cache.v_scale
    )  # fmt: skip
    for q in (wide[:, 1 : q_heads + 1], wide[:, : 2 * q_heads : 2], wide[:, q_heads:-1]):
        made.q = q
        everything = torch.ones(made.rows, dtype=torch.bool, device="cuda")
        assert q.stride(0) != q_heads * case.dim
        for pool in (made.cache, cache):
            got = attend(made, cache=pool)
            assert_alike(got, attend(made, hopper=False, cache=pool))
            assert_right(made, got, made.wanted(), everything)


@pytest.mark.parametrize("case", BASES, ids=str)
def test_it_writes_where_the_caller_says(case: Case) -> None:
    made = case.made([case.tokens, 3], [200, 50])
    wanted = attend(made)
    into = torch.full_like(wanted[0], 7.0), torch.full_like(wanted[1], 7.0)
    got = attend(made, into=into, want_lse=False)
    assert got[0] is into[0] and got[1] is into[1]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("case", BASES, ids=str)
def test_a_graph_replays_it(case: Case) -> None:
    new = (3 if case.long else 1) * case.tokens
    made = case.made([new] * 16, [2048] * 16, spare=0)
    batch = made.batch()
    n, q_heads, _ = made.q.shape
    form = plan.chosen_form(made.cache, batch, n, q_heads, made.q.dtype, None, made.cache.likeness)
    assert form is (plan.MANY if case.long else plan.FEW)[case.dim]

    def call() -> Tensor:
        return kg.prefix_attention(made.q, None, None, made.cache, batch, path="direct")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    made.q.copy_(torch.randn_like(made.q))
    graph.replay()
    assert torch.equal(out, attend(made, batch)[0])
    assert error(out, made.wanted()[0]) <= WORST


def test_blocks_past_two_to_the_31_words() -> None:
    blocks, page, heads, dim = 2**31 // (16 * 8 * 32) + 70, 16, 8, 128
    memory = torch.zeros(blocks, page, heads, dim, dtype=torch.uint8, device="cuda")
    pool = memory.view(torch.float8_e4m3fn)  # 8.6 GB, K and V alike
    memory[-64:] = torch.randint(0, 0x70, memory[-64:].shape, dtype=torch.uint8, device="cuda")
    new, total = 40, 64 * page - 5
    table = torch.arange(blocks - 64, blocks, device="cuda")[None]
    low = kg.PagedKVCache.from_tensors(*(pool[-64:].clone(),) * 2, layout="NHD", k_scale=0.01, v_scale=0.02)
    high = kg.PagedKVCache.from_tensors(pool, pool, layout="NHD", k_scale=0.01, v_scale=0.02)
    q = torch.randn(new, 32, dim, device="cuda", dtype=torch.bfloat16)
    made = Setup(high, table, q, q, q, q, q, [new], [total], 0)
    offsets = [cu_seqlens([n], "cuda") for n in (new, total)]
    batches = [
        PrefixBatch.build(
            ids, *offsets, page_size=page, num_blocks=cache.geometry.num_blocks, total_q=new, total_k=total,
            seqlens_q=[new], seqlens_k=[total],
        )
        for cache, ids in ((high, table), (low, table - table[0, 0]))
    ]  # fmt: skip
    outs = [attend(made, batch, cache=cache) for batch, cache in zip(batches, (high, low), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert_alike(outs[0], attend(made, batches[0], hopper=False))
