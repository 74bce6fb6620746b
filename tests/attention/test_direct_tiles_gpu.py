"""The direct kernel compiled, for every tile with narrow, wide and unequal heads, in every layout: values are right.

A tile and two head dims decide how tensor cores read shared memory. Each pair of these meets each layout, and each
layout each dtype; dtypes, windows, splits and kinds of scales take turns. 42 compilations.
"""

from __future__ import annotations

import pytest
import torch

from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from tests.attention.batches import assert_close
from tests.attention.batches import error as relative_error
from tests.attention.direct_cases import filled
from tests.attention.test_direct import assert_spare_rows_are_empty

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

DTYPES = [dtype for dtype in POOL_DTYPES if dtype.itemsize < 4]
TILES = {
    "16x64": (16, 64, 2, 2), "64x128": (64, 128, 4, 2), "128x128": (128, 128, 4, 2), "128x64": (128, 64, 4, 3),
    "128x64 SHUFFLE": (128, 64, 4, 2), "64x64": (64, 64, 8, 2), "64x32": (64, 32, 4, 2),
}  # fmt: skip
"""Rows, keys, warps and stages: what `choose_tile` chooses, and last a tile that only a caller can ask for."""
SHAPES = [
    ("16x64", (64, 32)), ("16x64", (16, 32)),
    ("64x128", (16, 16)), ("64x128", (32, 16)), ("64x128", (16, 64)), ("64x128", (64, 32)), ("64x128", (48, 32)),
    ("64x128", (128, 32)), ("64x128", (32, 128)),
    ("128x128", (32, 16)), ("128x128", (64, 32)), ("128x128", (16, 64)),
    ("128x64", (128, 32)), ("128x64", (32, 128)), ("128x64 SHUFFLE", (128, 32)), ("128x64 SHUFFLE", (16, 128)),
    ("64x64", (256, 32)), ("64x64", (32, 256)),
    ("64x32", (16, 16)),
]  # fmt: skip


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=[f"{tile}-{k}:{v}" for tile, (k, v) in SHAPES])
def test_values_are_right(shape: int, where: str = "cuda") -> None:
    from kvgather.attention.direct import Tile, direct_attention

    name, dims = SHAPES[shape]
    wrong = []
    for turn, layout in enumerate(LAYOUTS):
        draw = 3 * shape + turn
        dtype = DTYPES[(shape + 2 * turn) % len(DTYPES)]
        kinds = (KINDS[draw % len(KINDS)], KINDS[(draw // 2) % len(KINDS)])
        window = (None, None, 150)[(shape + turn) % 3]
        made = filled(
            [70, 3, 0], [301, 40, 5], kinds, heads=(2, 1), dims=dims, page_size=16, layout=layout, dtype=dtype,
            device=where, spare=2, q_dtype=torch.bfloat16 if draw % 2 else torch.float16,
        )  # fmt: skip
        got = direct_attention(
            made.q, made.cache, made.batch(), softmax_scale=dims[0] ** -0.5, window=window,
            tile=Tile(*TILES[name], splits=1 + 2 * (draw % 2)),
        )  # fmt: skip
        expected = made.wanted(window=window)
        try:
            assert_close(got, expected, made.rows)
            assert_spare_rows_are_empty(made, got)
        except AssertionError:
            error = relative_error(got[0][: made.rows], expected[0][: made.rows])
            wrong.append(f"{layout}, {dtype}, {kinds}, window {window}: {error:.2e}")
    assert not wrong, "\n".join(wrong)
