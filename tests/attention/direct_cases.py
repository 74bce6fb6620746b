"""Cases for the direct kernel: what it compiles for, any two values of it together at least once."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import torch

from kvgather.cases import SINKS, fits
from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from tests.attention.batches import Setup, setup

FACTORS: dict[str, tuple[Any, ...]] = {
    "layout": LAYOUTS,
    "k_kind": KINDS,
    "v_kind": KINDS,
    "dtype": POOL_DTYPES,
    "heads": ((2, 2), (3, 1), (5, 1), (8, 1)),
    "dims": ((16, 16), (24, 8), (80, 48), (48, 32)),
    "page_size": (1, 3, 16, 64),
    "window": (None, 1, 5, 128),
    "sinks": tuple(SINKS),
    "tile": ((16, 1), (32, 1), (16, 3), None),  # keys at a time and splits; None: what the launcher chooses
}
MIXES = (([3, 0, 1, 5], [34, 9, 20, 0]), ([7, 1], [13, 40]), ([1, 1, 1], [32, 0, 70]))


@dataclass(frozen=True)
class Case:
    """One value of each of `FACTORS`, and one of `MIXES`: new and cached tokens."""

    layout: str
    k_kind: str
    v_kind: str
    dtype: torch.dtype
    heads: tuple[int, int]
    dims: tuple[int, int]
    page_size: int
    window: int | None
    sinks: str
    tile: tuple[int, int] | None
    mix: int

    def __str__(self) -> str:
        kinds = self.k_kind if self.k_kind == self.v_kind else f"{self.k_kind}:{self.v_kind}"
        return (
            f"{self.layout}-{kinds}-{str(self.dtype).split('.')[1].removeprefix('float8_')}-"
            f"{self.heads[0]}/{self.heads[1]}x{self.dims[0]}:{self.dims[1]}-page{self.page_size}-window{self.window}-"
            f"sinks {self.sinks}-tile{self.tile}-mix{self.mix}"
        )

    @property
    def fits(self) -> bool:
        return fits(self.layout, self.page_size, self.dims[0], self.dtype)


def pairwise() -> list[Case]:
    """Cases in which any two values of two factors meet, wherever a layout has room for both."""
    drawn = random.Random(0)
    names = [field.name for field in fields(Case)][:-1]

    def draw(mix: int) -> Case:
        while not (case := Case(**{name: drawn.choice(FACTORS[name]) for name in names}, mix=mix)).fits:
            pass
        return case

    def pairs(case: Case) -> set[Any]:
        return set(combinations(((name, getattr(case, name)) for name in names), 2))

    possible = set().union(*(pairs(draw(0)) for _ in range(5000)))
    cases: list[Case] = []
    while possible:
        case = max((draw(len(cases) % len(MIXES)) for _ in range(60)), key=lambda case: len(pairs(case) & possible))
        if not pairs(case) & possible:
            continue
        cases.append(case)
        possible -= pairs(case)
    return cases


def filled(new: list[int], cached: list[int], kinds: tuple[str, str] | None = None, **more: Any) -> Setup:
    """A batch whose new tokens are in the pool too; scales differ, and whatever is no token's is NaN.

    Args:
        kinds: of K's scale and of V's; None is per-tensor for FP8, else none.
        more: see `setup`.
    """
    dtype = more.get("dtype", torch.float32)
    kinds = kinds or (("per-tensor",) * 2 if dtype.itemsize == 1 else ("none",) * 2)
    made = setup(new, cached, kind=kinds, **more)  # type: ignore[arg-type]
    cache, g = made.cache, made.cache.geometry
    used = torch.zeros(cache.num_slots, dtype=torch.bool, device=g.device)
    used[made.all_slots] = True
    stale = used.logical_not().nonzero()[:, 0]
    cache.write(made.k[made.is_new], made.v[made.is_new], made.all_slots[made.is_new])
    for scale in (cache.k_scale, cache.v_scale):
        if scale is not None:
            scale *= 0.5 + torch.rand(scale.shape, device=g.device)
    nan = [
        torch.full((len(stale), g.num_kv_heads, dim), torch.nan, device=g.device) for dim in (g.head_dim, g.v_head_dim)
    ]
    cache.write(nan[0], nan[1], stale)
    return made
