"""`gather`: check once, choose a backend, run."""

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
        `(cache.float() * scale).to(out_dtype)`, and without a scale `cache.to(out_dtype)`, also of an FP8 pool; rows of
        a bad block id are NaN; rows past `cu_seqlens_k[-1]` are not written. A CPU told to flush denormals
        (`torch.set_flush_denormal`) rounds products below FP32's normal numbers to 0.

    `torch.compile(fullgraph=True)` takes this call and `PagedKVCache.gather`, of a plan that was made outside.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
    """
    source = key_cache, value_cache, k_scale, v_scale
    meaning = (layout, k_kind, v_kind, out_dtype, backend)
    if not torch.compiler.is_compiling() and (done := gather_again(meaning, source, plan, out, out_dtype)) is not None:
        return done
    geometry = Geometry.of(key_cache, value_cache, layout)
    k = resolve_for(geometry, k_scale, "k_scale", k_kind)
    v = resolve_for(geometry, v_scale, "v_scale", v_kind)
    return gather_checked(source, meaning, plan, geometry, (k, v), out_dtype, out, backend)


def resolve_for(geometry: Geometry, scale: Tensor | float | None, name: str, kind: str | None) -> Scale:
    """`resolve` for a cache of this geometry."""
    return resolve(
        scale, name, num_blocks=geometry.num_blocks, num_heads=geometry.num_kv_heads, page_size=geometry.page_size,
        device=geometry.device, kind=kind,
    )  # fmt: skip


def gather_checked(
    source: Source,
    meaning: Hashable,
    plan: GatherPlan,
    geometry: Geometry,
    scales: tuple[Scale, Scale],
    out_dtype: torch.dtype,
    out: Sequence[Tensor] | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`gather` from pools whose geometry was read, and with scales that were checked against it.

    Args:
        source: pools and scales as they were given.
        meaning: what tells this call from others with the same tensors, to remember that it passed.
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

    if backend == "triton" and geometry.num_blocks and not compiling:  # an operator costs more than a launch
        from .kernel import Side, addresses_of, pointers_of, prepare

        sides = Side("key", key_cache, scales[0], k_out), Side("value", value_cache, scales[1], v_out)
        launch, pointers = prepare(*sides, geometry.layout), pointers_of(*sides)
        launch.from_records(plan.records, pointers, addresses_of(pointers))
        remember(meaning, launch, geometry, source, scales, (k_out, v_out), out is not None)
        return k_out, v_out
    k, v = (scale.in_memory(geometry.device) for scale in scales)
    pools = ops.as_operand(key_cache), ops.as_operand(value_cache)
    codes_dtype = torch.uint8 if out_dtype.itemsize == 1 else out_dtype
    described = (geometry.layout, dtype_name(geometry.dtype), k.kind, v.kind, backend)
    if compiling and out is None:
        outs = ops.gather_new(
            *pools, k.tensor, v.tensor, plan.records, rows, heads, geometry.head_dim, geometry.v_head_dim, codes_dtype,
            *described,
        )  # fmt: skip
        return outs[0].view(out_dtype), outs[1].view(out_dtype)
    outs = (k_out, v_out) if codes_dtype == out_dtype else (k_out.view(codes_dtype), v_out.view(codes_dtype))
    if compiling:
        ops.gather_out(*pools, k.tensor, v.tensor, plan.records, *outs, *described)
    else:
        ops.run(*pools, k, v, plan.records, *outs, geometry.layout, geometry.dtype, backend)
    return k_out, v_out


def gather_by_table(
    source: Source,
    meaning: Hashable,
    geometry: Geometry,
    scales: tuple[Scale, Scale],
    out: tuple[Tensor, Tensor],
    table: Table,
    total_tokens: int,
    backend: str,
    given: Source,
) -> None:
    """Gather a batch that has no plan: in one launch by Triton, through a plan otherwise; everything was checked.

    Args:
        source, meaning, geometry, scales: as in `gather_checked`.
        out: K and V, of the same dtype, checked by `check_out`.
        table: the batch, checked by `check_table`.
        total_tokens: as `GatherPlan.build` takes it.
        backend: "triton" or "torch".
        given: `source` as the caller has it, by which the next call is known again.
    """
    block_table, cu_seqlens, seq_starts, _ = table
    if geometry.num_blocks == 0 or backend == "torch" or torch.compiler.is_compiling():
        plan = GatherPlan.build(
            block_table, cu_seqlens, page_size=geometry.page_size, num_blocks=geometry.num_blocks,
            total_tokens=total_tokens, seq_starts=seq_starts,
        )  # fmt: skip
        gather_checked(source, meaning, plan, geometry, scales, out[0].dtype, out, backend)
        return
    from .kernel import Side, addresses_of, pointers_of, prepare

    sides = Side("key", source[0], scales[0], out[0]), Side("value", source[1], scales[1], out[1])
    launch, pointers = prepare(*sides, geometry.layout, (cu_seqlens, seq_starts)), pointers_of(*sides)
    sizes = geometry.num_blocks, total_tokens
    launch.from_table(block_table, cu_seqlens, seq_starts, *sizes, pointers, addresses_of(pointers))
    remember(meaning, launch, geometry, given, scales, out, given_out=True, table=table)


def choose_backend(backend: str, device: torch.device) -> str:
    """ "triton" or "torch" for a request and a device.

    Raises:
        BackendError: Triton was asked for and cannot run on this device.
    """
    if type(backend) is str and backend == "auto":
        return "triton" if device.type == "cuda" and triton_available() else "torch"
    check_choice(backend, "backend", BACKENDS)
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


def check_out_dtype(out_dtype: torch.dtype, pool_dtype: torch.dtype, scales: Sequence[Scale], name: str) -> None:
    """Raise unless rows of this dtype can come of a pool."""
    known, scaled = isinstance(out_dtype, torch.dtype), any(scale.kind != "none" for scale in scales)
    if known and (out_dtype in FLOATS or (out_dtype == pool_dtype and not scaled)):
        return
    accepted = ", ".join(dtype_name(d) for d in FLOATS)
    came = dtype_name(out_dtype) if known else described(out_dtype)
    raise TypeError(f"{name} is {came}; accepted: {accepted}, or without scales {dtype_name(pool_dtype)}")


def check_out(
    out: Sequence[Tensor],
    geometry: Geometry,
    total_tokens: int,
    dtype: torch.dtype,
    source: Source,
    names: tuple[str, str],
) -> tuple[Tensor, Tensor]:
    """Raise unless rows can be written to a pair of tensors: enough of them, each at an address of its own, and none
    at one of a pool, of a scale or of the other output."""
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
        taken = [tensor for tensor in source if isinstance(tensor, Tensor)]
        for name, tensor in zip(names, out, strict=True):
            if any(share_elements(tensor, other) for other in taken):
                raise ValueError(
                    f"{name} shares memory with a cache, a scale or the other output; accepted: memory of its own"
                )
            taken.append(tensor)
    return out[0], out[1]
