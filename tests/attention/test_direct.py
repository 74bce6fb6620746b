"""Attention straight from the pages is what the formula says over what the pages hold."""

from __future__ import annotations

import math
from typing import Any


import pytest
import torch
from torch import Tensor

from tests.attention.batches import Setup, assert_close
from tests.attention.direct_cases import MIXES, Case, filled, pairwise, sinks_for
from tests.where import on_each_device

pytestmark = pytest.mark.triton


def attend(made: Setup, tile: tuple[int, int] | None = (16, 1), **more: Any) -> tuple[Tensor, Tensor]:
    """What is under test; `tile` is keys at a time and splits, of the smallest tile there is."""
    from kvgather.attention.direct import Tile, direct_attention

    cut = None if tile is None else Tile(16, tile[0], num_warps=4, num_stages=2, splits=tile[1])
    batch = more.pop("batch", None) or made.batch()
    scale = more.pop("softmax_scale", made.cache.geometry.head_dim**-0.5)
    return direct_attention(more.pop("q", made.q), made.cache, batch, softmax_scale=scale, tile=cut, **more)


def assert_spare_rows_are_empty(made: Setup, got: tuple[Tensor, Tensor], sinks: Tensor | None = None) -> None:
    out, lse = (tensor[made.rows :] for tensor in got)
    assert len(out) == made.spare and out.eq(0).all()
    assert (lse.eq(-math.inf) if sinks is None else lse.eq(-math.inf) | lse.eq(sinks)).all()


@on_each_device
@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_any_two_of_what_it_compiles_for(case: Case, where: str) -> None:
    new, cached = MIXES[case.mix]
    made = filled(
        new, cached, (case.k_kind, case.v_kind), heads=case.heads, dims=case.dims, page_size=case.page_size,
        layout=case.layout, dtype=case.dtype, device=where, spare=2,
        q_dtype=torch.float32 if where == "cpu" else torch.bfloat16,
    )  # fmt: skip
    sinks = sinks_for(case.sinks, case.heads[0], where)
    got = attend(made, case.tile, window=case.window, sinks=sinks)
    assert_close(got, made.wanted(window=case.window, sinks=sinks), made.rows)
    assert_spare_rows_are_empty(made, got, sinks)
    if case.sinks == "very large":
        assert got[0].eq(0).all()
