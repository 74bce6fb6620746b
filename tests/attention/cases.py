"""The table of attention cases that the tests of both paths share: shapes, pages, masks, sinks, pools and lengths.

Small ones for a CPU, where the direct kernel runs under the interpreter; the whole grid for a GPU. A case is a
description; `build` makes its cache, table and rows (see `batches.setup`), `wanted` what attention over them gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from kvgather.formats.checks import dtype_name
from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from tests.attention.batches import Setup, setup
from tests.attention.batches import error as relative_error

__all__ = ["GRID", "HEADS", "SINKS", "SMALL", "Case", "build", "relative_error", "sinks_of", "wanted"]

HEADS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {  # query and KV heads, dims of K and V
    "64/8x64": ((64, 8), (64, 64)),
    "32/8x128": ((32, 8), (128, 128)),
    "16/2x256": ((16, 2), (256, 256)),
    "64/4x192:128": ((64, 4), (192, 128)),
    "5/1x80": ((5, 1), (80, 80)),
    "8/8x64": ((8, 8), (64, 64)),
    "4/2x16": ((4, 2), (16, 16)),  # for the interpreter, which takes its time
    "4/2x32:16": ((4, 2), (32, 16)),
}
MODELS = tuple(HEADS)[:5]
PAGES = (1, 16, 64)
WINDOWS = (None, 1, 128)
SINKS = {"off": None, "on": 0.5, "very large": 1e4, "very small": -1e4}


@dataclass(frozen=True)
class Case:
    """One batch and one layer.

    Attributes:
        new, cached: lengths of each sequence.
        heads: one of `HEADS`.
        page_size, layout, dtype, kind: of the pool; `kind` None is per-tensor for FP8, none otherwise.
        q_dtype: of q and of the new tokens.
        window: keys that a query sees at most.
        sinks: one of `SINKS`.
        spare: rows of q that belong to no sequence.
    """

    new: tuple[int, ...] = (5, 1, 2)
    cached: tuple[int, ...] = (14, 33, 0)
    heads: str = "4/2x16"
    page_size: int = 16
    layout: str = "NHD"
    dtype: torch.dtype = torch.float8_e4m3fn
    kind: str | None = None
    q_dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    sinks: str = "off"
    spare: int = 0

    def __str__(self) -> str:
        parts = [self.heads, self.layout, f"page{self.page_size}", dtype_name(self.dtype).removeprefix("float8_")]
        parts += [self.kind] if self.kind else []
        parts += [dtype_name(self.q_dtype)] if self.q_dtype != torch.bfloat16 else []
        parts += [f"window{self.window}"] if self.window else []
        parts += [f"sinks {self.sinks}"] if self.sinks != "off" else []
        parts += [f"spare{self.spare}"] if self.spare else []
        lengths = [f"{new}+{cached}" for new, cached in zip(self.new, self.cached, strict=True)]
        return "-".join([*parts, ",".join(lengths) or "nothing"])


def build(case: Case, device: str = "cpu", seed: int = 0) -> Setup:
    """The case's cache with its cached tokens, its table in random blocks, its new tokens and queries."""
    heads, dims = HEADS[case.heads]
    return setup(
        list(case.new), list(case.cached), heads=heads, dims=dims, page_size=case.page_size, layout=case.layout,
        dtype=case.dtype, kind=case.kind, q_dtype=case.q_dtype, device=device, spare=case.spare, seed=seed,
    )  # fmt: skip


def sinks_of(case: Case, device: str = "cpu") -> Tensor | None:
    """None, or the sink of each query head: around 0.5 and all different, or all very large, or very small."""
    value, heads = SINKS[case.sinks], HEADS[case.heads][0][0]
    if value is None:
        return None
    return value + torch.linspace(-1, 1, heads, device=device) * (abs(value) < 100)


def wanted(case: Case, made: Setup) -> tuple[Tensor, Tensor]:
    """The reference over what the pool holds, once the new tokens were written to `made.cache`."""
    return made.wanted(window=case.window, sinks=sinks_of(case, made.q.device.type))


def fits(case: Case) -> bool:
    """Whether the case's layout has room for its shapes."""
    x = 16 // case.dtype.itemsize
    return case.layout != "SHUFFLE" or (case.page_size % x == 0 and all(dim % x == 0 for dim in HEADS[case.heads][1]))


def _small() -> Iterator[Case]:
    base = Case()
    for layout, kind in product(LAYOUTS, KINDS):
        yield replace(base, layout=layout, kind=kind)
    for dtype, q_dtype in product(POOL_DTYPES, (torch.bfloat16, torch.float16, torch.float32)):
        yield replace(base, dtype=dtype, q_dtype=q_dtype, heads="4/2x32:16")
    for window, sinks in product((None, 1, 7), SINKS):
        yield replace(base, window=window, sinks=sinks, layout="HND")
    for page_size in (1, 3, 64):
        yield replace(base, page_size=page_size, spare=3)
    for new, cached in (
        ((5, 3), (0, 0)),  # nothing cached
        ((1, 1), (15, 16)),  # all but one
        ((1, 1, 1, 1), (0, 1, 16, 37)),  # decode
        ((3, 0, 2), (4, 0, 9)),  # an empty sequence
        ((0, 2, 0), (9, 5, 1)),  # cached, and nothing new
        ((0, 0), (7, 3)),
        ((), ()),
    ):
        yield replace(base, new=new, cached=cached)
        yield replace(base, new=new, cached=cached, window=4, sinks="on", spare=1)


def _grid() -> Iterator[Case]:
    lengths = (
        ((1, 16, 512, 100, 0, 128), (8192, 4099, 0, 1500, 33, 1)),
        ((16, 1, 200), (3000, 2048, 1025)),  # at least 1,024 cached in each
        ((1, 1, 1, 1), (8192, 0, 1, 4100)),
        ((512,), (8192,)),
    )
    masks = product(MODELS, PAGES, WINDOWS, SINKS, (torch.float8_e4m3fn, torch.bfloat16))
    for i, (heads, page_size, window, sinks, dtype) in enumerate(masks):
        new, cached = lengths[(i + i // 8 + i // 24) % 4]  # in turn, and not in step with what else takes turns
        layout = LAYOUTS[(i + i // 3) % 3]
        case = Case(new, cached, heads, page_size, layout, dtype, None, torch.bfloat16, window, sinks)
        yield case if fits(case) else replace(case, layout="HND")


SMALL: tuple[Case, ...] = tuple(case for case in dict.fromkeys(_small()) if fits(case))
GRID: tuple[Case, ...] = tuple(_grid())
