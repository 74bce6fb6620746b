"""Rows of a sequence with more new tokens than `max_q`: set to NaN in place, and no others."""

from __future__ import annotations

import pytest
import torch

from kvgather.batch.refused import refuse_rows
from kvgather.device import has_gpu, interpreting
from kvgather.lab.trace import trace
from tests.where import interpreted

TRACED_ON = "cuda" if has_gpu() and not interpreting() else "cpu"


@pytest.mark.parametrize(
    ("backend", "where"),
    [("torch", "cpu"), pytest.param("triton", "cpu", marks=[pytest.mark.triton, interpreted]),
     pytest.param("triton", "cuda", marks=[pytest.mark.triton, pytest.mark.gpu]),
     pytest.param("torch", "cuda", marks=pytest.mark.gpu)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_any_strides_are_refused(dtype: torch.dtype, backend: str, where: str) -> None:
    for heads, dim, max_q in ((3, 5, 2), (1, 64, 1), (8, 40, 0)):
        wide = torch.ones(12, heads + 1, dim + 3, dtype=dtype, device=where)
        out, lse = wide[:, 1:, 2 : 2 + dim], torch.ones(heads, 12, device=where).t()
        refuse_rows(out, lse, torch.tensor([0, 3, 3, 5, 10], dtype=torch.int32, device=where), max_q, backend)
        lens = [3, 3, 3, 2, 2, 5, 5, 5, 5, 5, 0, 0]
        nan = [length > max_q for length in lens]
        assert out.isnan().all((1, 2)).tolist() == out.isnan().any((1, 2)).tolist() == nan
        assert lse.isnan().all(1).tolist() == lse.isnan().any(1).tolist() == nan
        assert int(wide.isnan().sum()) == sum(nan) * heads * dim, "nothing beside the rows"


@pytest.mark.triton
def test_no_access_is_outside_its_tensor() -> None:
    out, lse = torch.zeros(51, 6, 40, device=TRACED_ON), torch.zeros(51, 6, device=TRACED_ON)
    offsets = torch.tensor([0, 40, 41, 48], dtype=torch.int32, device=TRACED_ON)
    with trace(strict=True) as t:
        refuse_rows(out, lse, offsets, 2, "triton")
    assert not t.violations, t.report()
    for name, each in (("out_ptr", 6 * 40), ("lse_ptr", 6)):
        stored = sum(int(access.mask.sum()) for access in t.select(name, kind="store"))
        assert stored == (40 + 7) * each, "rows of the first and the third sequence, each element once"


def test_nothing_is_launched_where_the_bound_cannot_be_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "searchsorted", lambda *_: pytest.fail("asked for"))
    out, lse = torch.zeros(3, 1, 1), torch.zeros(3, 1)
    for offsets, max_q in (([0, 3], 3), ([0], 0)):
        refuse_rows(out, lse, torch.tensor(offsets, dtype=torch.int32), max_q)
    assert not out.isnan().any()
