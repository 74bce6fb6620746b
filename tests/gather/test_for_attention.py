"""What attention gathers: as any gather, and V's rows of a bad block id are 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases.case import Case
from kvgather.cases.tensors import Built, build
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from tests.gather.oracle import assert_same, oracle, untouched
from tests.where import CPU, GPU, on_each_device

BF16, FP32, FN = torch.bfloat16, torch.float32, torch.float8_e4m3fn
BASE = Case(page_size=16, num_heads=2, k_dim=32, v_dim=16, lengths=(40, 7, 20), starts=(3, 0, 15), num_blocks=9)
CASES = (
    *(replace(BASE, layout=layout, k_kind=kind, v_kind=kind) for layout in LAYOUTS for kind in KINDS),
    # codes and floats as they are
    *(replace(BASE, layout=layout, dtype=dtype, out_dtype=dtype, k_kind="none", v_kind="none")
      for layout in LAYOUTS for dtype in (BF16, FP32, FN)),
    replace(BASE, dtype=BF16, out_dtype=BF16, k_kind="none", v_kind="per-head"),
    replace(BASE, dtype=BF16, out_dtype=BF16, k_kind="per-head", v_kind="none"),
    replace(BASE, page_size=3, num_heads=3, k_dim=20, v_dim=24, num_blocks=40, out_dtype=FP32),
)  # fmt: skip


def with_bad_ids(built: Built) -> tuple[Built, Tensor]:
    """A table with ids outside the pool, and one column too few; and which gathered rows that makes bad."""
    case, blocks = built.case, built.cache.geometry.num_blocks
    table = built.block_table[:, : max(case.pages) - 1].clone()
    table[0, 1], table[1, 0], table[2, 1], table[2, 0] = blocks, -7, -1, 2**31 - 1
    plan = kg.GatherPlan.build(
        table, built.cu_seqlens_k, page_size=case.page_size, num_blocks=blocks, total_tokens=case.total_tokens,
        seq_starts=built.seq_starts,
    )  # fmt: skip
    bad = []
    for row, start, length in zip(table.tolist(), case.starts, case.lengths, strict=True):
        for position in range(start, start + length):
            column = position // case.page_size
            bad.append(column >= len(row) or not 0 <= row[column] < blocks)
    return replace(built, block_table=table, plan=plan), torch.tensor(bad, device=table.device)


def wanted_of(built: Built, bad: Tensor) -> tuple[Tensor, Tensor]:
    k, v = built.cache.gather(built.plan, out_dtype=built.case.out_dtype, backend="torch")
    v.view(torch.uint8)[bad] = 0
    return k, v


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("backend", "where"),
    [("torch", "cpu"), *(pytest.param("triton", *where.values, marks=where.marks) for where in (CPU, GPU))],
)
def test_bad_rows_of_v_are_zero_and_those_of_k_are_nan(backend: str, where: str, case: Case) -> None:
    built, bad = with_bad_ids(build(case, where))
    assert bad.any() and not bad.all()
    got = built.cache.gather_for_attention(built.plan, case.out_dtype, backend=backend)
    assert_same(got, wanted_of(built, bad))
    assert got[0][bad].float().isnan().all() and got[1][bad].float().eq(0).all()


def test_the_loop_over_tokens_says_the_same() -> None:
    built, bad = with_bad_ids(build(CASES[0]))
    rows = [untouched((CASES[0].total_tokens, 2, dim), BF16) for dim in (32, 16)]
    oracle(built, (rows[0], rows[1]))
    rows[1][bad] = 0
    assert_same(built.cache.gather_for_attention(built.plan, BF16), (rows[0], rows[1]))


@on_each_device
def test_other_gathers_of_the_same_tensors_keep_their_nan(where: str) -> None:
    """A call is remembered by its meaning: whichever came first, each gives what it says."""
    for case in (CASES[1], replace(BASE, dtype=BF16, out_dtype=BF16, k_kind="none", v_kind="none")):
        built, bad = with_bad_ids(build(case, where))
        cache, plan = built.cache, built.plan
        nan = cache.gather(plan, out_dtype=case.out_dtype, backend="torch")
        out = tuple(torch.empty_like(rows) for rows in nan)
        for _ in range(3):
            got = cache.gather_for_attention(plan, case.out_dtype, out=out, backend="triton")
            assert_same(got, wanted_of(built, bad))
            assert_same(cache.gather(plan, out_dtype=case.out_dtype, out=out, backend="triton"), nan)
            got = kg.gather(
                cache.key_cache, cache.value_cache, plan, layout=case.layout, k_scale=cache.k_scale,
                v_scale=cache.v_scale, k_kind=case.k_kind, v_kind=case.v_kind, out_dtype=case.out_dtype, out=out,
                backend="triton",
            )  # fmt: skip
            assert_same(got, nan)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=CPU.marks)])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_it_compiles_without_a_graph_break(given: bool, backend: str) -> None:
    built, bad = with_bad_ids(build(CASES[0]))
    wanted = wanted_of(built, bad)

    def step(cache: kg.PagedKVCache, plan: kg.GatherPlan, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        k, v = cache.gather_for_attention(plan, BF16, out=out, backend=backend)
        return k + 0, v + 0

    torch.compiler.reset()
    out = (torch.empty_like(wanted[0]), torch.empty_like(wanted[1])) if given else None
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(built.cache, built.plan, out)
    assert_same(got, (wanted[0] + 0, wanted[1] + 0))


@on_each_device
def test_a_pool_without_blocks_has_bad_ids_alone(where: str) -> None:
    key, value = torch.zeros(0, 4, 2, 8, device=where), torch.zeros(0, 4, 2, 16, device=where)
    cache = kg.PagedKVCache.from_tensors(key, value, layout="NHD")
    plan = kg.GatherPlan.build(
        torch.zeros(1, 3, dtype=torch.int32, device=where), torch.tensor([0, 5], device=where), page_size=4,
        num_blocks=0, total_tokens=7,
    )  # fmt: skip
    for backend in ("torch", "triton"):
        out = torch.full((7, 2, 8), 7.0, device=where), torch.full((7, 2, 16), 7.0, device=where)
        k, v = cache.gather(plan, out_dtype=FP32, out=out, backend=backend)
        assert k[:5].isnan().all() and v[:5].isnan().all() and k[5:].eq(7).all() and v[5:].eq(7).all()
        k, v = cache.gather_for_attention(plan, FP32, out=out, backend=backend)
        assert k[:5].isnan().all() and v[:5].eq(0).all() and k[5:].eq(7).all() and v[5:].eq(7).all()
