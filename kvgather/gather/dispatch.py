"""`gather`: check the arguments, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..device import require_triton, triton_available
from ..formats.checks import check_choice, check_tensor, described, dtype_name, overlaps_itself, share_elements
from ..formats.fp8 import FLOATS
from ..formats.layout import Geometry
from ..formats.scale import Scale, resolve
from ..plan import GatherPlan
from . import ops
from .again import Source, Table, gather_again, remember

BACKENDS = ("auto", "triton", "torch")
OUT_NAMES = ("out[0]", "out[1]")


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
    """Gather K and V of a batch from a paged cache into dense rows.

    Args:
        key_cache, value_cache: pools in `layout`; FP8, bfloat16, float16 or float32; any strides.
        plan: the batch's `GatherPlan`, built for the cache's page size and device, and at most its number of blocks.
        layout: "NHD", "HND" or "SHUFFLE".
        k_scale, v_scale: None, a float, or FP32 `[1]`, `[heads]`, `[blocks, heads]` or `[blocks, heads, page]`; K and V
            may have scales of different kinds.
        k_kind, v_kind: the scale's kind; None derives it from the shape (see `kvgather.formats.scale.classify`).
        out_dtype: bfloat16, float16 or float32; or, without a scale, the pool's dtype, which copies the codes.
        out: (K, V), each `[rows, heads, dim]` of `out_dtype` with at least `plan.total_tokens` rows, filled in place.
        backend: "triton", "torch", or "auto": Triton on a GPU, torch on a CPU.

    Returns:
        K `[total_tokens, heads, head_dim]` and V `[total_tokens, heads, v_head_dim]`, or `out`. Every value is exactly
        `(cache.float() * scale).to(out_dtype)`, or without a scale `cache.to(out_dtype)`, also for an FP8 pool. Rows of
        a bad block id are NaN. Rows past `cu_seqlens_k[-1]` are not written. A CPU that flushes denormals
        (`torch.set_flush_denormal`) rounds products below FP32's normal numbers to 0.

    `torch.compile(fullgraph=True)` supports this call and `PagedKVCache.gather`, with a plan built outside.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing is launched.
    """
    source = key_cache, value_cache, k_scale, v_scale
    options = (layout, k_kind, v_kind, out_dtype, backend)
    if not torch.compiler.is_compiling() and (rows := gather_again(options, source, plan, out, out_dtype)) is not None:
        return rows
    geometry = Geometry.of(key_cache, value_cache, layout)
    k = resolve_for(geometry, k_scale, "k_scale", k_kind)
    v = resolve_for(geometry, v_scale, "v_scale", v_kind)
    return gather_checked(source, options, plan, geometry, (k, v), out_dtype, out, backend)


def resolve_for(geometry: Geometry, scale: Tensor | float | None, name: str, kind: str | None) -> Scale:
    """Call `resolve` with the sizes of a geometry."""
    return resolve(
        scale, name, num_blocks=geometry.num_blocks, num_heads=geometry.num_kv_heads, page_size=geometry.page_size,
        device=geometry.device, kind=kind,
    )  # fmt: skip


def gather_checked(
    source: Source,
    options: Hashable,
    plan: GatherPlan,
    geometry: Geometry,
    scales: tuple[Scale, Scale],
    out_dtype: torch.dtype,
    out: Sequence[Tensor] | None,
    backend: str,
    zero_bad_v: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gather` with a known geometry and scales that are checked against it.

    Args:
        source: pools and scales, as passed by the caller.
        options: the arguments that are not tensors, the key under which the call is remembered.
        zero_bad_v: whether V's rows of a bad block id are 0 (see `PagedKVCache.gather_for_attention`); if True,
            `options` must differ from those of a call with False.
    """
    _check_plan(plan, geometry)
    key_cache, value_cache = source[:2]
    check_out_dtype(out_dtype, geometry.dtype, scales, "out_dtype")
    backend = choose_backend(backend, geometry.device)
    rows, heads = plan.total_tokens, geometry.num_kv_heads
    compiling = torch.compiler.is_compiling()
    if out is not None:
        k_out, v_out = check_out(out, geometry, rows, out_dtype, source, OUT_NAMES)
    elif not compiling:
        k_out = key_cache.new_empty((rows, heads, geometry.head_dim), dtype=out_dtype)
        v_out = value_cache.new_empty((rows, heads, geometry.v_head_dim), dtype=out_dtype)

    if backend == "triton" and geometry.num_blocks and not compiling:  # the custom operator costs more than a launch
        from .kernel import Side, addresses_of, pointers_of, prepare

        sides = Side("key", key_cache, scales[0], k_out), Side("value", value_cache, scales[1], v_out)
        launch, pointers = prepare(*sides, geometry.layout, zero_bad_v=zero_bad_v), pointers_of(*sides)
        launch.from_records(plan.records, pointers, addresses_of(pointers))
        remember(options, launch, geometry, source, scales, (k_out, v_out), out is not None)
        return k_out, v_out
    k, v = (scale.in_memory(geometry.device) for scale in scales)
    pools = ops.as_operand(key_cache), ops.as_operand(value_cache)
    codes_dtype = torch.uint8 if out_dtype.itemsize == 1 else out_dtype
    metadata = (geometry.layout, dtype_name(geometry.dtype), k.kind, v.kind, backend)
    if compiling and out is None:
        outs = ops.gather_new(
            *pools, k.tensor, v.tensor, plan.records, rows, heads, geometry.head_dim, geometry.v_head_dim, codes_dtype,
            *metadata, zero_bad_v,
        )  # fmt: skip
        return outs[0].view(out_dtype), outs[1].view(out_dtype)
    outs = (k_out, v_out) if codes_dtype == out_dtype else (k_out.view(codes_dtype), v_out.view(codes_dtype))
    if compiling:
        ops.gather_out(*pools, k.tensor, v.tensor, plan.records, *outs, *metadata, zero_bad_v)
    else:
        ops.run(*pools, k, v, plan.records, *outs, geometry.layout, geometry.dtype, backend, zero_bad_v)
    return k_out, v_out


def gather_by_table(
    source: Source,
    options: Hashable,
    geometry: Geometry,
    scales: tuple[Scale, Scale],
    out: tuple[Tensor, Tensor],
    table: Table,
    total_tokens: int,
    backend: str,
    caller_source: Source,
) -> None:
    """Gather a batch without a plan: one launch with Triton, through a plan otherwise. Arguments are checked.

    Args:
        source, options, geometry, scales: as in `gather_checked`.
        out: K and V, of the same dtype, checked by `check_out`.
        table: the batch, checked by `check_table`.
        total_tokens: as in `GatherPlan.build`.
        backend: "triton" or "torch".
        caller_source: `source` as passed by the caller, before views of the pools were made; a repeated call is matched
            against it.
    """
    block_table, cu_seqlens, seq_starts, _ = table
    if geometry.num_blocks == 0 or backend == "torch" or torch.compiler.is_compiling():
        plan = GatherPlan.build(
            block_table, cu_seqlens, page_size=geometry.page_size, num_blocks=geometry.num_blocks,
            total_tokens=total_tokens, seq_starts=seq_starts,
        )  # fmt: skip
        gather_checked(source, options, plan, geometry, scales, out[0].dtype, out, backend)
        return
    from .kernel import Side, addresses_of, pointers_of, prepare

    sides = Side("key", source[0], scales[0], out[0]), Side("value", source[1], scales[1], out[1])
    launch, pointers = prepare(*sides, geometry.layout, (cu_seqlens, seq_starts)), pointers_of(*sides)
    sizes = geometry.num_blocks, total_tokens
    launch.from_table(block_table, cu_seqlens, seq_starts, *sizes, pointers, addresses_of(pointers))
    remember(options, launch, geometry, caller_source, scales, out, has_out=True, table=table)


def choose_backend(backend: str, device: torch.device) -> str:
    """Return "triton" or "torch" for a `backend` argument and a device.

    Raises:
        BackendError: `backend` is "triton", which cannot run on this device.
    """
    if type(backend) is str and backend == "auto":
        return "triton" if device.type == "cuda" and triton_available() else "torch"
    check_choice(backend, "backend", BACKENDS)
    if backend == "triton" and not torch.compiler.is_compiling():  # operators check it when they run
        require_triton(device)
    return backend


def _check_plan(plan: GatherPlan, geometry: Geometry) -> None:
    if not isinstance(plan, GatherPlan):
        raise TypeError(f"plan is {type(plan).__name__}; accepted: a GatherPlan, from GatherPlan.build(...)")
    check_made_for(geometry, "plan", plan.page_size, plan.num_blocks, plan.device)


def check_made_for(geometry: Geometry, name: str, page_size: int, num_blocks: int, device: torch.device) -> None:
    """Raise unless a plan or a batch was built for a cache's page size, number of blocks and device.

    Args:
        geometry: the cache's.
        name: the argument's name, for errors.
        page_size, num_blocks, device: of the plan or the batch.

    Raises:
        ValueError: one of the three does not match.
    """
    if page_size != geometry.page_size:
        raise ValueError(f"{name} was made for page_size {page_size}; accepted: the cache's, {geometry.page_size}")
    if num_blocks > geometry.num_blocks:
        raise ValueError(
            f"{name} was made for a pool of {num_blocks} blocks; accepted: at most the cache's {geometry.num_blocks}"
        )
    if device != geometry.device:
        raise ValueError(f"{name} is on {device}; accepted: the cache's device, {geometry.device}")


def check_out_dtype(out_dtype: torch.dtype, pool_dtype: torch.dtype, scales: Sequence[Scale], name: str) -> None:
    """Raise unless a pool of `pool_dtype` with these scales can be gathered into rows of `out_dtype`."""
    is_dtype, scaled = isinstance(out_dtype, torch.dtype), any(scale.kind != "none" for scale in scales)
    if is_dtype and (out_dtype in FLOATS or (out_dtype == pool_dtype and not scaled)):
        return
    accepted = ", ".join(dtype_name(d) for d in FLOATS)
    received = dtype_name(out_dtype) if is_dtype else described(out_dtype)
    raise TypeError(f"{name} is {received}; accepted: {accepted}, or without scales {dtype_name(pool_dtype)}")


def check_out(
    out: Sequence[Tensor],
    geometry: Geometry,
    total_tokens: int,
    dtype: torch.dtype,
    source: Source,
    names: tuple[str, str],
) -> tuple[Tensor, Tensor]:
    """Raise unless `out` is a pair of tensors with enough rows, whose elements share no address with each other, with
    a pool, with a scale or with the other output."""
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
        others = [tensor for tensor in source if isinstance(tensor, Tensor)]
        for name, tensor in zip(names, out, strict=True):
            if any(share_elements(tensor, other) for other in others):
                raise ValueError(
                    f"{name} shares memory with a cache, a scale or the other output; accepted: memory of its own"
                )
            others.append(tensor)
    return out[0], out[1]
