"""The direct kernel compiled, on the whole grid of shapes, pages, windows, sinks and pools."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from kvgather.cases import GRID, HEADS, MODELS, AttentionCase, sinks_of
from tests.attention.batches import assert_close, setup_of
from tests.attention.batches import error as relative_error
from tests.attention.direct_cases import filled
from tests.attention.test_direct import attend

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

NAMES = {shape: name for name, shape in HEADS.items()}
BY_SHAPE = {
    shape: list(cases) for shape, cases in groupby(GRID, lambda case: f"{NAMES[case.heads]}-page{case.page_size}")
}  # fmt: skip


@pytest.mark.parametrize("shape", BY_SHAPE)
def test_the_grid(shape: str) -> None:
    wrong = []
    for case in BY_SHAPE[shape]:
        made = setup_of(case, "cuda")
        sinks = sinks_of(case.sinks, case.q_heads, "cuda")
        made.cache.write(made.k[made.is_new], made.v[made.is_new], made.all_slots[made.is_new])
        got = attend(made, None, window=case.window, sinks=sinks)
        wanted = made.wanted(window=case.window, sinks=sinks)
        try:
            assert_close(got, wanted, made.rows)
            assert case.sinks != "very large" or got[0].eq(0).all()
        except AssertionError:
            wrong.append(f"{case.name}: {relative_error(got[0][: made.rows], wanted[0]):.2e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("heads", MODELS)
def test_every_tile_that_the_launcher_chooses(heads: str, rows: int) -> None:
    """One sequence alone, too: 1 is a constant to Triton's compiler."""
    for sequences in (1, 5):
        made = setup_of(
            AttentionCase(**HEADS[heads]._asdict(), new=(rows,) * sequences, cached=(3000,) * sequences), "cuda"
        )
        made.cache.write(made.k[made.is_new], made.v[made.is_new], made.all_slots[made.is_new])
        assert_close(attend(made, None), made.wanted())


def test_huge_and_tiny_rows_in_half_precision() -> None:
    """Products are fused with the subtraction of the row's largest, which has to be exact for that."""
    made = filled(
        [8], [300], dtype=torch.float8_e4m3fn, q_dtype=torch.bfloat16, dims=(64, 64), heads=(8, 1), page_size=16,
        device="cuda",
    )  # fmt: skip
    for row, size in enumerate((1e-30, 1e30, 1e10, 1e12, 1e15, 1.0, 0.0, 1e-38)):
        made.q[row] *= size
    expected = made.wanted()
    for tile in (None, (64, 1), (64, 4)):
        out, lse = attend(made, tile)
        for row in range(len(out)):
            assert relative_error(out[row], expected[0][row]) <= 1e-2, row
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-2, atol=2e-2)
        assert not out.isnan().any()
