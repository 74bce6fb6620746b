"""The Triton kernel against the reference, bit for bit, over the shared table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvgather.bench.cases import SMALL, Case, build
from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.scale import KINDS
from tests.gather.oracle import assert_same, untouched
from tests.where import on_each_device


@on_each_device
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel_equals_reference(case: Case, where: str) -> None:
    built = build(case, where, seed=1)
    outs = []
    for backend in ("triton", "torch"):
        k_out, v_out = (
            untouched((case.total_tokens + 2, case.num_heads, dim), case.out_dtype, where)
            for dim in (case.k_dim, case.v_dim)
        )
        built.cache.gather(built.plan, out_dtype=case.out_dtype, out=(k_out, v_out), backend=backend)
        outs.append((k_out, v_out))
    assert_same(*outs)


def test_table_covers_what_it_says() -> None:
    assert len({case.name for case in SMALL}) == len(SMALL)
    assert {(case.k_kind, case.v_kind) for case in SMALL} >= {(k, v) for k in KINDS for v in KINDS}
    seen = {(case.dtype, kind) for case in SMALL for kind in (case.k_kind, case.v_kind)}
    assert seen >= {(dtype, kind) for dtype in POOL_DTYPES for kind in KINDS}
    assert {case.dtype for case in SMALL if case.dtype == case.out_dtype} == set(POOL_DTYPES)
    assert torch.bfloat16 in {case.out_dtype for case in SMALL}


@on_each_device
def test_launches_of_one_shape_and_another_meaning(where: str) -> None:
    """Equal shapes and strides in another layout, dtype or scale kind: no launch may be taken for another."""
    square = Case(page_size=4, num_heads=4, lengths=(3,), starts=(1,), num_blocks=4)  # NHD's strides are HND's
    for change in (
        {}, {"layout": "HND"}, {"dtype": torch.float8_e5m2}, {"dtype": torch.float8_e4m3fnuz}, {"layout": "NHD"},
        {"k_kind": "per-head"}, {"k_kind": "per-page-head"}, {"k_kind": "none", "v_kind": "none"},
        {"k_kind": "none", "v_kind": "none", "out_dtype": torch.float8_e4m3fn}, {"dtype": torch.float16},
        {"dtype": torch.bfloat16}, {"dtype": torch.float16, "out_dtype": torch.float16}, {"out_dtype": torch.float32},
    ):  # fmt: skip
        case = replace(square, **change)  # type: ignore[arg-type]
        built = build(case, where)
        assert_same(
            built.cache.gather(built.plan, out_dtype=case.out_dtype, backend="triton"),
            built.cache.gather(built.plan, out_dtype=case.out_dtype, backend="torch"),
        )
