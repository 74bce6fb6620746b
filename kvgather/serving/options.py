"""What a caller decides about the pools: dtype, layout, kind and values of the scales, path of the attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.batch import PrefixBatch
from ..attention.choose import PATHS
from ..cache import PagedKVCache
from ..formats.checks import check_choice, check_int
from ..formats.fp8 import check_pool_dtype, is_fp8
from ..formats.layout import LAYOUTS
from ..formats.scale import KINDS
from ..parallel.heads import scale_of_heads

Gather = Callable[[PagedKVCache, PrefixBatch, torch.dtype], tuple[Tensor, Tensor]]
"""Dense K `[batch.total_k, heads, head_dim]` and V of all cached and new tokens of a batch, in the given dtype."""


@dataclass(frozen=True)
class Options:
    """Options of the pools and of the attention.

    Attributes:
        dtype: of the pools.
        layout: "NHD", "HND" or "SHUFFLE".
        scale: the kind of both scales of an FP8 pool; pools of other dtypes have no scale.
        k_scale, v_scale: the scales of every layer, in the shape of the kind and of all heads, also where a rank holds
            some of them: a float, or an FP32 tensor on the model's device. None means 1 everywhere. Scales per block
            are copied, and move with the codes where a request is forked.
        path: of `prefix_attention`: "auto", "direct", "gather" or "hybrid".
        workspace_tokens: upper bound of the tokens that one gather of this package reads, or None.
        gather: reads the cached and new tokens of prefills that found a cached prefix, in the place of this package's
            gather; None means this package's.

    Raises:
        TypeError, ValueError: an option is wrong.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    layout: str = "NHD"
    scale: str = "per-tensor"
    k_scale: Tensor | float | None = None
    v_scale: Tensor | float | None = None
    path: str = "auto"
    workspace_tokens: int | None = None
    gather: Gather | None = None

    def __post_init__(self) -> None:
        check_pool_dtype(self.dtype, "dtype")
        check_choice(self.layout, "layout", LAYOUTS)
        check_choice(self.scale, "scale", KINDS)
        check_choice(self.path, "path", PATHS)
        if self.workspace_tokens is not None:
            check_int(self.workspace_tokens, "workspace_tokens", minimum=1)
        if self.kind != "none" or (self.k_scale is None is self.v_scale):
            return
        if not is_fp8(self.dtype):
            raise ValueError(f"k_scale or v_scale was given for pools of {self.dtype}; accepted: an FP8 dtype")
        name = "v_scale" if self.k_scale is None else "k_scale"
        raise ValueError(f"{name} was given; accepted for scale none: None")

    def of_heads(self, heads: range, num_kv_heads: int) -> Options:
        """The options of a rank that holds some of the model's KV heads: its part of the scales.

        Raises:
            TypeError, ValueError: a scale has not the shape of its kind for all heads.
        """
        if len(heads) == num_kv_heads:
            return self
        k_scale, v_scale = (
            scale_of_heads(scale, self.kind, heads, num_kv_heads=num_kv_heads, name=name)
            for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale))
        )
        return replace(self, k_scale=k_scale, v_scale=v_scale)

    @property
    def kind(self) -> str:
        """The kind of the scales that the pools have."""
        return self.scale if is_fp8(self.dtype) else "none"
