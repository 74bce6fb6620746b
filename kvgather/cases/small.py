"""The gathers that tests compare with the reference: every case is small enough for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..formats.fp8 import FLOATS, POOL_DTYPES
from ..formats.layout import LAYOUTS
from ..formats.scale import KINDS
from .case import POOL_STYLES, Case

SHAPES = (
    {"page_size": 1, "num_heads": 1, "k_dim": 8, "v_dim": 8, "lengths": (3, 2), "starts": ()},
    {"page_size": 7, "num_heads": 3, "k_dim": 40, "v_dim": 24, "lengths": (9,), "starts": (4,)},
    {"page_size": 16, "num_heads": 1, "k_dim": 64, "v_dim": 64, "lengths": (33,), "starts": ()},
    {"page_size": 16, "num_heads": 9, "k_dim": 16, "v_dim": 16, "lengths": (1, 15), "starts": (15, 1)},
    {"page_size": 16, "num_heads": 5, "k_dim": 80, "v_dim": 80, "lengths": (17,), "starts": ()},
    {"page_size": 16, "num_heads": 3, "k_dim": 192, "v_dim": 128, "lengths": (20,), "starts": (8,)},
    {"page_size": 16, "num_heads": 7, "k_dim": 64, "v_dim": 72, "lengths": (4,), "starts": ()},
    {"page_size": 24, "num_heads": 2, "k_dim": 48, "v_dim": 8, "lengths": (30,), "starts": (23,)},
    {"page_size": 32, "num_heads": 6, "k_dim": 96, "v_dim": 96, "lengths": (5, 0, 0, 2), "starts": (30, 9, 64, 1)},
    {"page_size": 48, "num_heads": 4, "k_dim": 112, "v_dim": 16, "lengths": (50,), "starts": (47,)},
    {"page_size": 64, "num_heads": 8, "k_dim": 64, "v_dim": 64, "lengths": (70,), "starts": ()},
    {"page_size": 128, "num_heads": 2, "k_dim": 128, "v_dim": 128, "lengths": (40,), "starts": (100,)},
    {"page_size": 256, "num_heads": 1, "k_dim": 256, "v_dim": 256, "lengths": (5,), "starts": (254,)},
)
"""Geometries and batches with one difficulty each: an odd head count, a page size or a head dim that is not a power of
two, a single token, a start in the last slot of a page, empty sequences."""


def _cases() -> Iterator[Case]:
    base, num_kinds = Case(), len(KINDS)
    for nth, layout in enumerate(LAYOUTS):
        plain = replace(base, layout=layout)
        for i, k_kind in enumerate(KINDS):
            for j, v_kind in enumerate(KINDS):
                if layout == "SHUFFLE" or (j - i) % num_kinds == 2:
                    yield replace(plain, k_kind=k_kind, v_kind=v_kind)
        for i, dtype in enumerate(POOL_DTYPES):  # over the three layouts each dtype meets every kind
            k_kind, v_kind = KINDS[(i + 2 * nth) % num_kinds], KINDS[(i + 2 * nth + 1) % num_kinds]
            yield replace(plain, dtype=dtype, k_kind=k_kind, v_kind=v_kind, out_dtype=FLOATS[(i + nth) % 3])
            yield replace(plain, dtype=dtype, k_kind="none", v_kind="none", out_dtype=dtype)  # a copy of the codes
        for shape in SHAPES:
            case = replace(plain, k_kind="per-token-head", **shape)  # type: ignore[arg-type]
            yield case if case.fits else replace(case, dtype=torch.float16, v_kind="per-page-head")
        for style in POOL_STYLES[1:]:
            yield replace(plain, pool_style=style, v_kind="per-token-head")
            yield replace(plain, pool_style=style, dtype=torch.bfloat16, k_dim=24, k_kind="per-head", v_kind="none")
        yield replace(plain, spare_rows=21)
        yield replace(plain, index_dtype=torch.int64)
        yield replace(plain, lengths=(), starts=())
        yield replace(plain, lengths=(19, 0, 5), starts=(3, 0, 16))
        yield replace(plain, lengths=(20, 20), starts=(), num_blocks=2)  # sequences that share blocks
        yield replace(plain, lengths=(16, 32), starts=(16, 0), dtype=POOL_DTYPES[nth], v_kind="none")  # full pages only


SMALL: tuple[Case, ...] = tuple(dict.fromkeys(case for case in _cases() if case.fits))
"""Every pair of scale kinds, every dtype with every kind and as a copy of codes, every shape of `SHAPES` and every pool
style, in every layout that can represent them."""
