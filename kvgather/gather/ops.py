"""The gather as two custom PyTorch operators, for torch.compile and opcheck.

An FP8 pool is passed as uint8 with the name of its dtype, and a scale as its tensor and its kind. `dispatch.gather` has
checked the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import require_triton
from ..formats.layout import Which
from ..formats.scale import Scale
from .reference import gather_pool


def run(
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Scale,
    v_scale: Scale,
    records: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    layout: str,
    dtype: torch.dtype,
    backend: str,
    zero_bad_v: bool,
) -> None:
    """Run the gather. Both operators call this function; eager calls use it directly."""
    if backend == "triton" and key_cache.shape[0]:
        from .kernel import launch

        pools = key_cache.view(dtype), value_cache.view(dtype)
        launch(*pools, layout, k_scale, v_scale, records, k_out, v_out, zero_bad_v)
        return
    sides: tuple[tuple[Tensor, Which, Scale, Tensor], ...]
    sides = ((key_cache, "key", k_scale, k_out), (value_cache, "value", v_scale, v_out))
    for pool, which, scale, out in sides:
        raw = scale.kind == "none" and out.dtype == pool.dtype
        rows, zero_bad = out.view(dtype) if raw else out, zero_bad_v and which == "value"
        gather_pool(pool.view(dtype), layout, which, scale, records, rows, zero_bad)


@torch.library.custom_op("kvgather::gather_out", mutates_args=("k_out", "v_out"))
def gather_out(
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    records: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    layout: str,
    pool_dtype: str,
    k_kind: str,
    v_kind: str,
    backend: str,
    zero_bad_v: bool = False,
) -> None:
    """Fill `k_out` and `v_out`; rows without a record do not change. `zero_bad_v`: see `gather_checked`."""
    if backend == "triton":
        require_triton(key_cache.device)
    scales = Scale.of(k_kind, k_scale), Scale.of(v_kind, v_scale)
    run(key_cache, value_cache, *scales, records, k_out, v_out, layout, getattr(torch, pool_dtype), backend, zero_bad_v)


@gather_out.register_fake
def _(
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    records: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    layout: str,
    pool_dtype: str,
    k_kind: str,
    v_kind: str,
    backend: str,
    zero_bad_v: bool = False,
) -> None:
    return None


@torch.library.custom_op("kvgather::gather", mutates_args=())
def gather_new(
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    records: Tensor,
    total_tokens: int,
    num_heads: int,
    k_dim: int,
    v_dim: int,
    out_dtype: torch.dtype,
    layout: str,
    pool_dtype: str,
    k_kind: str,
    v_kind: str,
    backend: str,
    zero_bad_v: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return new K and V of `total_tokens` rows; rows without a record are uninitialized."""
    if backend == "triton":
        require_triton(key_cache.device)
    k_out = key_cache.new_empty((total_tokens, num_heads, k_dim), dtype=out_dtype)
    v_out = value_cache.new_empty((total_tokens, num_heads, v_dim), dtype=out_dtype)
    scales = Scale.of(k_kind, k_scale), Scale.of(v_kind, v_scale)
    run(key_cache, value_cache, *scales, records, k_out, v_out, layout, getattr(torch, pool_dtype), backend, zero_bad_v)
    return k_out, v_out


@gather_new.register_fake
def _(
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    records: Tensor,
    total_tokens: int,
    num_heads: int,
    k_dim: int,
    v_dim: int,
    out_dtype: torch.dtype,
    layout: str,
    pool_dtype: str,
    k_kind: str,
    v_kind: str,
    backend: str,
    zero_bad_v: bool = False,
) -> tuple[Tensor, Tensor]:
    return (
        key_cache.new_empty((total_tokens, num_heads, k_dim), dtype=out_dtype),
        value_cache.new_empty((total_tokens, num_heads, v_dim), dtype=out_dtype),
    )


def as_operand(pool: Tensor) -> Tensor:
    """Return a pool as an operand of the operators: FP8 viewed as uint8."""
    return pool.view(torch.uint8) if pool.dtype.itemsize == 1 else pool
