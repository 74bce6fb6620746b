"""Rows that need a bad block are NaN on every path, and no others; rows of no sequence are the same on all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention.batch import PrefixBatch
from kvgather.attention.reference import reference_attention
from kvgather.cases.attention import sinks_of
from tests.attention.batches import Setup, error, gather_first, hybrid, setup, ways_with
from tests.attention.direct_cases import filled
from tests.attention.rows import cudnn, short_flash, stand_in
from tests.attention.test_direct import attend
from tests.where import CPU, GPU, on_each_device

FN, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
POOLS: tuple[tuple[torch.dtype, tuple[str, str], str], ...] = (
    (FP32, ("none", "none"), "NHD"),
    (BF16, ("none", "none"), "HND"),
    (BF16, ("none", "none"), "SHUFFLE"),
    (FN, ("per-tensor", "per-tensor"), "NHD"),
    (FN, ("per-token-head", "per-head"), "SHUFFLE"),
    (FN, ("per-page-head", "per-token-head"), "HND"),
)
SHAPES = (((4, 2), (16, 16)), ((3, 1), (32, 16)), ((2, 2), (16, 48)))
WINDOWS = (None, None, 1, 2, 5, 20)


def needs_a_bad_block(
    table: list[list[int]], new: list[int], total: list[int], page_size: int, num_blocks: int, window: int | None,
    max_q: int, max_k: int,
) -> list[bool]:  # fmt: skip
    """Of each new token: whether it sees a key that is in no block of the pool, or its sequence is past a bound."""
    nan: list[bool] = []
    for ids, queries, keys in zip(table, new, total, strict=True):
        too_long = queries > max_q or keys > min(max_k, max(len(ids), 1) * page_size)
        for i in range(queries):
            position, bad = keys - queries + i, too_long
            for key in range(position + 1):
                if window is None or key > position - window:
                    column = key // page_size
                    bad = bad or column >= len(ids) or not 0 <= ids[column] < num_blocks
            nan.append(bad)
    return nan


@dataclass
class Drawn:
    """A batch with bad ids in its table.

    Attributes:
        made: its cache holds all tokens, and NaN in every other slot.
        bounds: of the batch, where the host knows no lengths.
        lengths: whether it does.
        window, sinks: of the layer.
    """

    made: Setup
    window: int | None = None
    sinks: Tensor | None = None
    lengths: bool = True
    bounds: dict[str, int] = field(default_factory=dict)

    def batch(self) -> PrefixBatch:
        return self.made.batch(self.lengths, **self.bounds)

    def nan(self) -> Tensor:
        """The loop's answer for every row of q; rows of no sequence see nothing."""
        made, g = self.made, self.made.cache.geometry
        most = 2**31
        rows = needs_a_bad_block(
            made.block_table.tolist(), made.new, made.total, g.page_size, g.num_blocks, self.window,
            self.bounds.get("max_q", most), self.bounds.get("max_k", most),
        )  # fmt: skip
        return torch.tensor(rows + [False] * made.spare, dtype=torch.bool, device=made.q.device)

    def wanted(self) -> tuple[Tensor, Tensor]:
        """The reference, with 0 for what is in bad blocks: rows that see it are not looked at."""
        k, v = (torch.nan_to_num(rows, nan=0.0) for rows in self.made.held())
        q = self.made.q[: self.made.rows]
        return reference_attention(q, k, v, *self.made.offsets, window=self.window, sinks=self.sinks)

    def assert_right(self, got: tuple[Tensor, Tensor], told: str) -> None:
        """NaN where the loop says so, the reference elsewhere, and nothing in rows that belong to no sequence."""
        nan, used, (out, lse) = self.nan(), self.made.rows, got
        assert out.isnan().all((1, 2)).tolist() == out.isnan().any((1, 2)).tolist() == nan.tolist(), told
        assert lse.isnan().all(1).tolist() == lse.isnan().any(1).tolist() == nan.tolist(), told
        wanted_out, wanted_lse = self.wanted()
        good, exact = ~nan[:used], out.dtype == FP32 and not out.is_cuda
        assert error(out[:used][good], wanted_out[good]) <= (1e-5 if exact else 1e-2), told
        torch.testing.assert_close(
            lse[:used][good].double(), wanted_lse[good], rtol=1e-5 if exact else 1e-2, atol=1e-5 if exact else 2e-2
        )
        empty_out, empty_lse = self.empty()
        assert torch.equal(out[used:], empty_out) and torch.equal(lse[used:], empty_lse), told

    def empty(self) -> tuple[Tensor, Tensor]:
        """Rows that belong to no sequence."""
        q, heads, dim = self.made.q, self.made.q.shape[1], self.made.cache.geometry.v_head_dim
        lse = torch.full((self.made.spare, heads), -math.inf, device=q.device)
        return q.new_zeros(self.made.spare, heads, dim), lse if self.sinks is None else lse.copy_(self.sinks)

    def workspaces(self) -> Iterator[int | None]:
        page, all_of_it = self.made.cache.geometry.page_size, max(sum(self.made.total), 1)
        yield from dict.fromkeys((None, 1, page, 2 * page + 1, 24, all_of_it // 2 + 1, all_of_it))

    def gathered(self, batch: PrefixBatch) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """What the gather path gives in each workspace that the layer can do with."""
        for tokens in self.workspaces():
            try:
                got = self.made.attend(
                    batch, path="gather", window=self.window, sinks=self.sinks, workspace_tokens=tokens
                )
            except ValueError as small:
                assert tokens is not None and "workspace_tokens is" in str(small)
                continue
            yield f"workspace {tokens}", got


def drawn(seed: int, where: str, **more: Any) -> Drawn:
    """A batch, its pool, what it is attended with, and where its table is bad or too short."""
    draw = random.Random(seed)
    sequences = draw.randint(1, 4)
    new = [draw.choice((0, 1, 2, 5, 9, 17)) for _ in range(sequences)]
    cached = [draw.choice((0, 1, 3, 7, 16, 31, 40)) for _ in range(sequences)]
    dtype, kinds, layout = draw.choice(POOLS)
    heads, dims = draw.choice(SHAPES)
    page_size = 16 if layout == "SHUFFLE" else draw.choice((1, 3, 4, 16))
    given = {"q_dtype": draw.choice((FP32, BF16)), "spare": draw.choice((0, 3)), **more}
    made = filled(
        new, cached, kinds, heads=heads, dims=dims, page_size=page_size, layout=layout, dtype=dtype, device=where,
        seed=seed, **given,
    )  # fmt: skip
    blocks = made.cache.geometry.num_blocks
    made.block_table = made.block_table.to(draw.choice((torch.int32, torch.int64)))
    for sequence, total in enumerate(made.total):
        new_from = cached[sequence] // page_size
        first = draw.choice((0, new_from, new_from + 1))  # anywhere, or where new tokens are
        share = draw.choice((0.1, 0.3)) if first else draw.choice((0.0, 0.1))
        for column in range(first, -(-total // page_size)):
            if draw.random() < share:
                made.block_table[sequence, column] = draw.choice((-1, -7, blocks, 2**31 - 1))
    case = Drawn(
        made, draw.choice(WINDOWS), sinks_of(draw.choice(("off", "on", "very large")), heads[0], where),
        lengths=draw.random() < 0.5,
    )  # fmt: skip
    if not case.lengths:
        case.bounds["max_q"] = draw.choice((5, 17, 20))
        if draw.random() < 0.3:
            case.bounds["max_k"] = draw.choice((4, 20, 60))
        if draw.random() < 0.3:
            made.block_table = made.block_table[:, : draw.randint(1, made.block_table.shape[1])].contiguous()
    return case


def test_the_loop_by_hand() -> None:
    """Pages of 2, a pool of 5 blocks; 3 new tokens at positions 4 to 6, 1 at position 2, and 2 with too many tokens."""
    table = [[0, 1, 5, 3], [4, 2, 0, 0], [-1, 0, 0, 0]]
    shape = (table, [3, 1, 2], [7, 3, 9], 2, 5)
    assert needs_a_bad_block(*shape, None, 3, 99) == [True, True, True, False, True, True]
    assert needs_a_bad_block(*shape, 1, 3, 99) == [True, True, False, False, True, True]
    assert needs_a_bad_block(*shape, 2, 3, 8) == [True, True, True, False, True, True]
    assert needs_a_bad_block(*shape, 1, 2, 99) == [True, True, True, False, True, True]
    assert needs_a_bad_block([[-1, 0], [0, 7]], [3, 2], [4, 3], 2, 5, None, 9, 9) == [True, True, True, False, True]
    assert needs_a_bad_block([[-1, 0], [0, 7]], [3, 2], [4, 3], 2, 5, 2, 9, 9) == [True, True, False, False, True]


@pytest.mark.parametrize("seed", range(100))
def test_gathered_in_any_workspace(seed: int) -> None:
    case = drawn(seed, "cpu")
    batch = case.batch()
    for told, got in case.gathered(batch):
        case.assert_right(got, told)


@on_each_device
@pytest.mark.parametrize("seed", range(1000, 1024))
def test_both_paths_agree(seed: int, where: str) -> None:
    case = drawn(seed, where)
    batch = case.batch()
    for told, got in case.gathered(batch):
        case.assert_right(got, told)
    case.assert_right(case.made.attend(batch, path="direct", window=case.window, sinks=case.sinks), "direct")


@on_each_device
@pytest.mark.parametrize("seed", range(2000, 2012))
def test_splits_of_the_direct_path_agree_too(seed: int, where: str) -> None:
    case = drawn(seed, where, q_dtype=FP32)
    batch = case.batch()
    if batch.max_q == 0 or batch.max_k == 0:
        batch = case.made.batch(max_q=1)
    for splits in (1, 3):
        case.assert_right(attend(case.made, (16, splits), batch=batch, window=case.window, sinks=case.sinks), "direct")


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("seed", range(3000, 3025))
def test_gathered_for_the_kernels_of_a_gpu(seed: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that mask scores as those do, and multiply by weights of 0."""
    stand_in(monkeypatch, **{backend: {"flash": short_flash, "cudnn": cudnn}[backend]})
    case = drawn(seed, "cpu", q_dtype=BF16)
    for told, got in case.gathered(case.batch()):
        case.assert_right(got, told)


@on_each_device
@pytest.mark.parametrize("which", ["off", "on"])
@pytest.mark.parametrize("column", [0, 1, 2, 3, 5, 6], ids=lambda column: f"column {column}")
def test_the_hybrid_path(column: int, which: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad block in the gathered part, in the cached tokens behind it, and in the new tokens."""
    made = filled([3, 0, 6], [9, 3, 20], heads=(2, 1), dims=(16, 16), spare=2, device=where, q_dtype=BF16, dtype=FN)
    made.block_table[2, column] = made.cache.geometry.num_blocks
    case = Drawn(made, sinks=sinks_of(which, 2, where))
    for length in (4, 9):
        gather_first(monkeypatch, length)
        got = hybrid(made, case.batch(), 16**-0.5, case.sinks)
        case.assert_right(got, f"{length} first")


@pytest.mark.parametrize("where", [CPU, GPU])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("short", ["table", "max_k"])
def test_more_new_tokens_than_a_sequence_may_have_at_all(short: str, window: int | None, where: str) -> None:
    """9 tokens, all new, where 5 or 8 are allowed: the first ones too are NaN, and not rows that see nothing."""
    made = filled([2, 9, 1], [3, 0, 4], heads=(4, 2), dims=(16, 16), spare=2, device=where)
    case = Drawn(made, window, lengths=False)
    if short == "table":
        made.block_table = made.block_table[:, :2].contiguous()
    else:
        case.bounds["max_k"] = 5
    for known in (False, True):
        batch = case.made.batch(False, **case.bounds, **({"seqlens_q": made.new} if known else {}))
        for told, got in case.gathered(batch):
            case.assert_right(got, told)
        case.assert_right(made.attend(batch, path="direct", window=window), "direct")


@on_each_device
@pytest.mark.parametrize("which", ["off", "on", "bfloat16"])
@pytest.mark.parametrize("mix", [([3, 0, 1], [18, 5, 16]), ([1, 1], [40, 0]), ([0, 0], [5, 3]), ([], [])], ids=str)
def test_rows_of_no_sequence_are_the_same_to_the_bit(mix: tuple[list[int], list[int]], which: str, where: str) -> None:
    made = setup(*mix, heads=(3, 1), dims=(16, 16), spare=5, device=where, q_dtype=BF16)
    sinks = sinks_of("off" if which == "off" else "on", 3, where)
    if sinks is not None and which == "bfloat16":
        sinks = sinks.bfloat16()
    for lengths in (True, False):
        for window in (None, 4):
            case = Drawn(made, window, sinks, lengths)
            batch = case.batch()
            results = dict(case.gathered(batch))
            results["direct"] = made.attend(batch, path="direct", window=window, sinks=sinks)
            if batch.num_sequences and batch.max_q and batch.max_k:
                results |= {
                    f"direct x{n}": attend(made, (16, n), batch=batch, window=window, sinks=sinks) for n in (1, 3)
                }
            for told, (out, lse) in results.items():
                empty_out, empty_lse = case.empty()
                assert torch.equal(out[made.rows :], empty_out) and torch.equal(lse[made.rows :], empty_lse), told


@on_each_device
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_nothing_are_the_same_to_the_bit(with_sinks: bool, where: str) -> None:
    """New tokens that are not among a sequence's tokens: `check()` reports them, and they come before all keys."""
    made = filled([4, 2], [0, 3], heads=(40, 1), dims=(16, 16), device=where, q_dtype=BF16)
    offsets = made.offsets[0], torch.tensor([0, 2, 7], device=where)  # 4 new tokens among 2
    batch = PrefixBatch.build(
        made.block_table, *offsets, page_size=4, num_blocks=made.cache.geometry.num_blocks, total_q=6, total_k=9
    )
    sinks = torch.linspace(-3, 3, 40, device=where) if with_sinks else None
    seen = torch.full((40,), -math.inf, device=where) if sinks is None else sinks
    calls: tuple[dict[str, Any], ...] = (
        {"path": "gather"}, {"path": "gather", "workspace_tokens": 4}, {"path": "direct"},
    )  # fmt: skip
    results = [
        kg.prefix_attention(made.q, None, None, made.cache, batch, sinks=sinks, return_lse=True, **call)
        for call in calls
    ]
    results += [attend(made, (16, splits), batch=batch, sinks=sinks) for splits in (1, 3)]
    for out, lse in results:
        assert out[:2].eq(0).all() and not out.isnan().any()
        assert torch.equal(lse[:2], seen.expand(2, 40))


WAYS = ways_with(workspace_tokens=2100)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("window", [None, 1, 300])
@pytest.mark.parametrize("dims", [(64, 64), (128, 64)], ids=str)
@pytest.mark.parametrize("new", [[150, 1, 300, 33, 7], [1, 1, 1, 1, 1], [16, 16, 16, 16, 16]], ids=str)
def test_long_sequences_on_a_gpu(new: list[int], dims: tuple[int, int], window: int | None) -> None:
    """By cuDNN, flash and the direct kernel: at least 1,024 cached in each, and rows in more tiles than one."""
    cached = [2050, 1100, 1300, 3001, 1024]
    made = filled(
        new, cached, heads=(8, 2), dims=dims, page_size=16, dtype=FN, layout="SHUFFLE", q_dtype=BF16, device="cuda",
        spare=9,
    )  # fmt: skip
    bad = ((0, 132), (1, 68), (1, 0), (2, 90), (3, 150))  # the new tokens, the last page, the gathered part
    for sequence, column in bad:
        made.block_table[sequence, column] = (-1, -7, made.cache.geometry.num_blocks, 2**31 - 1)[column % 4]
    for way, (lengths, call) in WAYS.items():
        case = Drawn(made, window, torch.linspace(-1, 1, 8, device="cuda"), lengths)
        case.assert_right(made.attend(case.batch(), window=window, sinks=case.sinks, **call), way)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("way", ["gather, bounds", "gather, workspace, bounds", "direct, bounds"])
def test_a_graph_replays_with_other_bad_ids(way: str, window: int | None) -> None:
    made = filled(
        [5, 30, 1], [700, 90, 900], heads=(8, 2), dims=(64, 64), page_size=16, dtype=FN, q_dtype=BF16, device="cuda",
        spare=4,
    )  # fmt: skip
    good, case = made.block_table.clone(), Drawn(made, window, lengths=False)
    call = WAYS[way][1] | ({"workspace_tokens": 300} if "workspace" in way else {})

    offsets, num_blocks = made.offsets, made.cache.geometry.num_blocks

    def step() -> tuple[Tensor, Tensor]:
        batch = kg.PrefixBatch.build(
            made.block_table, *offsets, page_size=16, num_blocks=num_blocks, total_q=made.rows + made.spare,
            total_k=sum(made.total),
        )  # fmt: skip
        return kg.prefix_attention(made.q, None, None, made.cache, batch, window=window, return_lse=True, **call)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for bad in ((), ((0, 0), (2, 56)), ((1, 6),), (), ((0, 44), (1, 0))):
        made.block_table.copy_(good)
        for sequence, column in bad:
            made.block_table[sequence, column] = 10**6
        graph.replay()
        case.assert_right(got, f"{way}, bad {bad}")
