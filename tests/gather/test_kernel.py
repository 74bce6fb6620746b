"""The Triton kernel against the reference, bit for bit, over the shared table of cases."""

from __future__ import annotations

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
