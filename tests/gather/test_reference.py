"""The reference against the oracle, and by hand."""

from __future__ import annotations

import pytest
import torch

import kvgather as kg
from kvgather.cases import SMALL, Case, build
from kvgather.formats.fp8 import FORMATS
from kvgather.formats.layout import LAYOUTS
from kvgather.gather import reference
from tests.gather.oracle import assert_same, oracle, untouched


def elements(case: Case) -> int:
    return case.total_tokens * case.num_heads * max(case.k_dim, case.v_dim)


ORACLE_CASES = [case for case in SMALL if elements(case) <= 800]  # the oracle takes 40 µs an element


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_reference_equals_the_oracle(case: Case) -> None:
    built = build(case, seed=2)
    outs = [
        tuple(untouched((case.total_tokens, case.num_heads, dim), case.out_dtype) for dim in (case.k_dim, case.v_dim))
        for _ in range(2)
    ]
    built.cache.gather(built.plan, out_dtype=case.out_dtype, out=outs[0], backend="torch")  # type: ignore[arg-type]
    oracle(built, outs[1])  # type: ignore[arg-type]
    assert_same(*outs)  # type: ignore[arg-type]


def test_the_oracle_meets_every_kind_dtype_layout_and_memory() -> None:
    for field in ("layout", "dtype", "k_kind", "v_kind", "pool_style", "index_dtype", "out_dtype"):
        assert {getattr(case, field) for case in ORACLE_CASES} == {getattr(case, field) for case in SMALL}, field


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_full_pages_of_ordinary_values_take_a_shorter_way_to_the_same_bits(
    layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(
        Case(layout=layout, dtype=dtype, lengths=(16, 16), starts=(16, 0), v_kind="none"), seed=3, values="normal"
    )
    ways = []
    short_way = reference.decode_into_bfloat16
    monkeypatch.setattr(reference, "decode_into_bfloat16", lambda *given: ways.append(short_way(*given)) or ways[-1])
    rows = built.cache.gather(built.plan)
    assert ways == [True, True]
    wanted = (torch.empty_like(rows[0]), torch.empty_like(rows[1]))
    oracle(built, wanted)
    assert_same(rows, wanted)


def test_by_hand() -> None:
    # 3 blocks, page 2, 1 head, dim 1: the pool holds 1 … 6; the scale of (block, slot) is 1, 10, 100, …
    pool = torch.arange(1.0, 7.0).view(3, 2, 1, 1)
    scale = torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5]).view(3, 1, 2)
    plan = kg.GatherPlan.build(
        torch.tensor([[2, 0], [1, 1]]),
        torch.tensor([0, 3, 4]),
        page_size=2,
        num_blocks=3,
        seq_starts=torch.tensor([0, 3]),
    )
    k, v = kg.gather(pool, -pool, plan, k_scale=scale, v_scale=None, out_dtype=torch.float32)
    assert k.flatten().tolist() == [5e4, 6e5, 1.0, 4e3]
    assert v.flatten().tolist() == [-5.0, -6.0, -1.0, -4.0]


def test_many_chunks_give_what_one_chunk_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(Case(lengths=(70, 0, 33), starts=(5, 3, 31), k_kind="per-token-head", page_size=16))
    whole = built.cache.gather(built.plan, backend="torch")
    for size in (1, 700, 2000):
        monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", size)
        assert_same(built.cache.gather(built.plan, backend="torch"), whole)
