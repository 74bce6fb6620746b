"""`gather`: check once, choose a backend, run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import require_triton, triton_available
from ..formats.checks import check_choice, check_tensor, described, dtype_name, extent, overlaps_itself
from ..formats.fp8 import FLOATS
from ..formats.layout import Geometry
from ..formats.scale import Scale, resolve
from ..plan import GatherPlan
from . import ops

BACKENDS = ("auto", "triton", "torch")


def gather(
    key_cache: Tensor,
    value_cache: Tensor,
    plan: GatherPlan,
    *,
    layout: str = "NHD",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    k_kind: str | None = None,
    v_kind: str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gather the K and V of a batch out of a paged cache into dense rows.

    Args:
        key_cache, value_cache: pools in `layout`; FP8, bfloat16, float16 or float32; any strides.
        plan: the batch's `GatherPlan`, made for this page size, on this device, for at most this many blocks.
        layout: "NHD", "HND" or "SHUFFLE".
        k_scale, v_scale: None, a float, or FP32 `[1]`, `[heads]`, `[blocks, heads]` or `[blocks, heads, page]`; K's and
            V's may be of different kinds.
        k_kind, v_kind: the scale's kind, where its shape should not decide (see `kvgather.formats.scale.classify`).
        out_dtype: bfloat16, float16 or float32; the pool's own dtype copies codes as they are, without a scale.
        out: (K, V), `[rows, heads, dim]` each with at least `plan.total_tokens` rows, to be filled; dtype `out_dtype`.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.

    Returns:
        K `[total_tokens, heads, head_dim]` and V `[total_tokens, heads, v_head_dim]`, or `out`. Every value is exactly
        `(cache.float() * scale).to(out_dtype)`; rows of a bad block id are NaN; rows past `cu_seqlens_k[-1]` are not
        written.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
    """
    return gather_named(
        key_cache, value_cache, plan, layout, k_scale, v_scale, k_kind, v_kind, out_dtype, out, backend,
        out_names=("out[0]", "out[1]"), scale_names=("k_scale", "v_scale"), dtype_name_of="out_dtype",
    )  # fmt: skip


def gather_named(
    key_cache: Tensor,
    value_cache: Tensor,
    plan: GatherPlan,
    layout: str,
    k_scale: Tensor | float | None,
    v_scale: Tensor | float | None,
    k_kind: str | None,
    v_kind: str | None,
    out_dtype: torch.dtype,
    out: Sequence[Tensor] | None,
    backend: str,
    *,
    out_names: tuple[str, str],
    scale_names: tuple[str, str],
    dtype_name_of: str,
) -> tuple[Tensor, Tensor]:
    """`gather`, with the names that its caller's arguments have in errors."""
    geometry = Geometry.of(key_cache, value_cache, layout)
    device = geometry.device
    sizes = {
        "num_blocks": geometry.num_blocks,
        "num_heads": geometry.num_kv_heads,
        "page_size": geometry.page_size,
    }
    k = resolve(k_scale, scale_names[0], **sizes, device=device, kind=k_kind)
    v = resolve(v_scale, scale_names[1], **sizes, device=device, kind=v_kind)
    return gather_resolved(
        key_cache, value_cache, plan, geometry, (k, v), out_dtype, out, backend,
        out_names=out_names, dtype_name_of=dtype_name_of,
    )  # fmt: skip


def gather_resolved(
    key_cache: Tensor,
    value_cache: Tensor,
    plan: GatherPlan,
    geometry: Geometry,
    scales: tuple[Scale, Scale],
    out_dtype: torch.dtype,
    out: Sequence[Tensor] | None,
    backend: str,
    *,
    out_names: tuple[str, str] = ("out[0]", "out[1]"),
    dtype_name_of: str = "out_dtype",
) -> tuple[Tensor, Tensor]:
    """`gather` from pools whose geometry was read, and with scales that were checked against it."""
    k, v = scales
    _check_plan(plan, geometry)
    _check_out_dtype(out_dtype, geometry.dtype, (k.kind, v.kind) != ("none", "none"), dtype_name_of)
    backend = choose_backend(backend, geometry.device)

    compiling = torch.compiler.is_compiling()
    pools = ops.as_operand(key_cache), ops.as_operand(value_cache)
    held_dtype = torch.uint8 if out_dtype.itemsize == 1 else out_dtype
    meaning = (geometry.layout, dtype_name(geometry.dtype), k.kind, v.kind, backend)
    rows, heads = plan.total_tokens, geometry.num_kv_heads
    if out is None and compiling:
        outs = ops.gather_new(
            *pools, k.tensor, v.tensor, plan.records, rows, heads, geometry.head_dim, geometry.v_head_dim, held_dtype,
            *meaning,
        )  # fmt: skip
        return outs[0].view(out_dtype), outs[1].view(out_dtype)
    if out is None:
        k_out = key_cache.new_empty((rows, heads, geometry.head_dim), dtype=out_dtype)
        v_out = value_cache.new_empty((rows, heads, geometry.v_head_dim), dtype=out_dtype)
    else:
        k_out, v_out = _check_out(out, geometry, rows, out_dtype, (key_cache, value_cache), out_names)
    outs = (k_out, v_out) if held_dtype == out_dtype else (k_out.view(held_dtype), v_out.view(held_dtype))
    if compiling:
        ops.gather_out(*pools, k.tensor, v.tensor, plan.records, *outs, *meaning)
    else:  # an operator costs more than a launch
        ops.run(*pools, k, v, plan.records, *outs, geometry.layout, geometry.dtype, backend)
    return k_out, v_out


def choose_backend(backend: str, device: torch.device) -> str:
    """ "triton" or "torch" for a request and a device.

    Raises:
        BackendError: Triton was asked for and cannot run on this device.
    """
    check_choice(backend, "backend", BACKENDS)
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and triton_available() else "torch"
    if backend == "triton" and not torch.compiler.is_compiling():  # the operators ask again when they run
        require_triton(device)
    return backend


def _check_plan(plan: GatherPlan, geometry: Geometry) -> None:
    if not isinstance(plan, GatherPlan):
        raise TypeError(f"plan is {type(plan).__name__}; accepted: a GatherPlan, from GatherPlan.build(...)")
    check_made_for(geometry, "plan", plan.page_size, plan.num_blocks, plan.device)


def check_made_for(geometry: Geometry, name: str, page_size: int, num_blocks: int, device: torch.device) -> None:
    """Raise unless what was made for these pages, blocks and device fits a cache.

    Raises:
        ValueError: with `name`, what it was made for, and what the cache has.
    """
    if page_size != geometry.page_size:
        raise ValueError(f"{name} was made for page_size {page_size}; accepted: the cache's, {geometry.page_size}")
    if num_blocks > geometry.num_blocks:
        raise ValueError(
            f"{name} was made for a pool of {num_blocks} blocks; accepted: at most the cache's {geometry.num_blocks}"
        )
    if device != geometry.device:
        raise ValueError(f"{name} is on {device}; accepted: the cache's device, {geometry.device}")


def _check_out_dtype(out_dtype: torch.dtype, pool_dtype: torch.dtype, scaled: bool, name: str) -> None:
    known = isinstance(out_dtype, torch.dtype)
    if known and (out_dtype in FLOATS or (out_dtype == pool_dtype and not scaled)):
        return
    accepted = ", ".join(dtype_name(d) for d in FLOATS)
    came = dtype_name(out_dtype) if known else described(out_dtype)
    raise TypeError(f"{name} is {came}; accepted: {accepted}, or without scales {dtype_name(pool_dtype)}")


def _check_out(
    out: Sequence[Tensor],
    geometry: Geometry,
    total_tokens: int,
    dtype: torch.dtype,
    pools: tuple[Tensor, Tensor],
    names: tuple[str, str],
) -> tuple[Tensor, Tensor]:
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out is {type(out).__name__}; accepted: a pair of tensors (K, V)")
    for name, tensor, dim in zip(names, out, (geometry.head_dim, geometry.v_head_dim), strict=True):
        check_tensor(tensor, name, ndim=3, dtypes=(dtype,), device=geometry.device)
        if tensor.shape[0] < total_tokens or tensor.shape[1:] != (geometry.num_kv_heads, dim):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted: at least {total_tokens} rows of "
                f"[{geometry.num_kv_heads}, {dim}]"
            )
        if overlaps_itself(tensor):
            raise ValueError(f"{name} has strides {list(tensor.stride())}; accepted: rows that do not overlap")
    if not torch.compiler.is_compiling():
        held = [_addresses(pool) for pool in pools]
        for name, tensor in zip(names, out, strict=True):
            begin, end = _addresses(tensor)
            if any(begin < other_end and other_begin < end for other_begin, other_end in held):
                raise ValueError(f"{name} shares memory with a cache or the other output; accepted: memory of its own")
            held.append((begin, end))
    return out[0], out[1]


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one after its last."""
    begin = tensor.data_ptr()
    return begin, begin + extent(tensor) * tensor.element_size()
