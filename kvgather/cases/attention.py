"""One layer and one batch of the prefix path, as a description; and the grid of them that the GPU tests run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.checks import dtype_name
from ..formats.layout import LAYOUTS
from .case import Case, fits


class Heads(NamedTuple):
    """Heads and head dims of a layer."""

    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def counts(self) -> tuple[int, int]:
        """Query heads, KV heads."""
        return self.q_heads, self.kv_heads

    @property
    def dims(self) -> tuple[int, int]:
        """Head dims of K and of V."""
        return self.head_dim, self.v_head_dim


HEADS: dict[str, Heads] = {
    "64/8x64": Heads(64, 8, 64, 64),
    "32/8x128": Heads(32, 8, 128, 128),
    "16/2x256": Heads(16, 2, 256, 256),
    "64/4x192:128": Heads(64, 4, 192, 128),
    "5/1x80": Heads(5, 1, 80, 80),
    "8/8x64": Heads(8, 8, 64, 64),
    "4/2x16": Heads(4, 2, 16, 16),  # small, for Triton's interpreter
    "4/2x32:16": Heads(4, 2, 32, 16),
}
MODELS = tuple(HEADS)[:5]
"""The names of the shapes that models have."""
PAGES = (1, 16, 64)
WINDOWS = (None, 1, 128)
SINKS = {"off": None, "on": 0.5, "very large": 1e4, "very small": -1e4}
"""Logits of attention sinks, around which `sinks_of` spreads those of the heads."""


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One layer and one batch: sequences with cached and new tokens.

    Attributes:
        q_heads, kv_heads, head_dim: heads and head dim of the layer.
        v_head_dim: head dim of V; None means `head_dim`.
        new, cached: new and cached tokens of each sequence.
        layout, dtype, page_size: layout, pool dtype and page size of the cache.
        kind: scale kind of both K and V.
        q_dtype: dtype of q and of the new tokens.
        window: sliding window of the layer, or None.
        sinks: one of `SINKS`.
    """

    q_heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    v_head_dim: int | None = None
    new: tuple[int, ...] = (16,) * 16
    cached: tuple[int, ...] = (8192,) * 16
    layout: str = "NHD"
    dtype: torch.dtype = torch.float8_e4m3fn
    kind: str = "per-tensor"
    page_size: int = 16
    q_dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    sinks: str = "off"

    @property
    def heads(self) -> Heads:
        v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        return Heads(self.q_heads, self.kv_heads, self.head_dim, v_head_dim)

    @property
    def name(self) -> str:
        """A unique name; `64/4x192:128-NHD-page16-e4m3fn-per-tensor-16+8192`."""
        q_heads, kv_heads, k_dim, v_dim = self.heads
        dims = f"{k_dim}" if k_dim == v_dim else f"{k_dim}:{v_dim}"
        pool = dtype_name(self.dtype).removeprefix("float8_")
        parts = [f"{q_heads}/{kv_heads}x{dims}", self.layout, f"page{self.page_size}", pool, self.kind]
        parts += [dtype_name(self.q_dtype)] if self.q_dtype != torch.bfloat16 else []
        parts += [f"window{self.window}"] if self.window else []
        parts += [f"sinks {self.sinks}"] if self.sinks != "off" else []
        lengths = ",".join(f"{new}+{cached}" for new, cached in zip(self.new, self.cached, strict=True))
        return "-".join([*parts, lengths or "no sequences"])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cached + new tokens of each sequence."""
        return tuple(cached + new for cached, new in zip(self.cached, self.new, strict=True))

    @property
    def gather(self) -> Case:
        """The cache, and the gather of all cached and new tokens from it."""
        _, num_heads, k_dim, v_dim = self.heads
        return Case(
            layout=self.layout, dtype=self.dtype, k_kind=self.kind, v_kind=self.kind, out_dtype=self.q_dtype,
            page_size=self.page_size, num_heads=num_heads, k_dim=k_dim, v_dim=v_dim, lengths=self.lengths, starts=(),
        )  # fmt: skip

    @property
    def fits(self) -> bool:
        """Whether the layout can represent the geometry."""
        return fits(self.layout, self.page_size, self.head_dim, self.dtype)


def sinks_of(which: str, num_heads: int, device: torch.device | str = "cpu") -> Tensor | None:
    """The sinks of a layer.

    Args:
        which: one of `SINKS`; "on" gives logits from −0.5 to 1.5, the large and the small ones are equal for all heads.
        num_heads: query heads.
        device: device of the logits.

    Returns:
        `[num_heads]` FP32, or None for "off".
    """
    logit = SINKS[which]
    if logit is None:
        return None
    spread = torch.linspace(-1, 1, num_heads, device=device) if abs(logit) < 100 else 0.0
    return torch.full((num_heads,), logit, device=device) + spread


def _grid() -> Iterator[AttentionCase]:
    lengths = (
        ((1, 16, 512, 100, 0, 128), (8192, 4099, 0, 1500, 33, 1)),
        ((16, 1, 200), (3000, 2048, 1025)),  # at least 1,024 cached tokens in each sequence
        ((1, 1, 1, 1), (8192, 0, 1, 4100)),
        ((512,), (8192,)),
    )
    combinations = product(MODELS, PAGES, WINDOWS, SINKS, (torch.float8_e4m3fn, torch.bfloat16))
    for i, (heads, page_size, window, sinks, dtype) in enumerate(combinations):
        new, cached = lengths[(i + i // 8 + i // 24) % 4]  # out of step with the other factors
        case = AttentionCase(
            **HEADS[heads]._asdict(), new=new, cached=cached, page_size=page_size, layout=LAYOUTS[(i + i // 3) % 3],
            dtype=dtype, kind="per-tensor" if dtype.itemsize == 1 else "none", window=window, sinks=sinks,
        )  # fmt: skip
        yield case if case.fits else replace(case, layout="HND")


GRID: tuple[AttentionCase, ...] = tuple(_grid())
"""Every model's shape × page size × window × sinks × pool dtype; lengths and layouts take turns."""
