"""Repeated calls: a gather whose tensors match those of an earlier call skips the checks that cannot fail again.

An engine makes the same call once a layer. A guard (`kernels.guards`) covers every property that the full checks test,
except six: addresses, memory, sizes that change with the batch, values of scales on a CPU, numbers, and whether an
output shares memory with another tensor. A call that matches a guard is checked for these six only. Any other call goes
through the full checks, whose errors name the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device import interpreting
from ..formats.checks import extent
from ..formats.layout import Geometry
from ..formats.scale import Scale, acceptable_number, check_values
from ..kernels.guards import guard
from ..kernels.signatures import MOST, inside, offset_lanes, row_reach
from ..plan import GatherPlan

if TYPE_CHECKING:  # imports triton, which may be missing
    from .kernel import GatherLaunch

Source = tuple[Tensor, Tensor, Tensor | float | None, Tensor | float | None]
"""The pools of K and V, then the scales of K and V, as passed by the caller."""
Table = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A block table, its offsets, its starts, and each token's sequence."""

ARGUMENT_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors that an argument of a wrong type raises here; the full checks raise an error that names the argument."""
MAX_CALLS_PER_KEY = 64
"""Calls to remember for one key. An engine has one for each kind of layer and alignment of its outputs."""


@dataclass(frozen=True, slots=True)
class CheckedCall:
    """A call that passed every check.

    Attributes:
        launch: its prepared launch.
        matches: the guard: whether other tensors match the call's.
        page_size, num_blocks, device: of its pools.
        spans: bytes from the first to the last element of each pool and each scale; 0 for no scale.
        k_reach, v_reach: elements from the first to the last element of an output row.
        shapes: of a row of K and of a row of V.
        code_size, itemsize: bytes per element of the pools, and of the outputs.
        scales: the resolved scales on a CPU, where each call checks their values; None elsewhere.
    """

    launch: GatherLaunch
    matches: Callable[..., bool]
    page_size: int
    num_blocks: int
    device: torch.device
    spans: tuple[int, int, int, int]
    k_reach: int
    v_reach: int
    shapes: tuple[tuple[int, int], tuple[int, int]]
    code_size: int
    itemsize: int
    scales: tuple[Scale, Scale] | None


_CALLS: dict[Hashable, list[CheckedCall]] = {}


def remember(
    options: Hashable,
    launch: GatherLaunch,
    geometry: Geometry,
    source: Source,
    scales: tuple[Scale, Scale],
    out: Sequence[Tensor],
    has_out: bool,
    table: Table | None = None,
) -> None:
    """Remember a checked call, for later calls that differ only in addresses and in the size of the batch.

    Args:
        options: all arguments that are not tensors, as in `gather_again` or `gather_table_again`.
        launch: the call's prepared launch.
        geometry, scales: of its cache; the scales are resolved.
        source: pools and scales, as passed by the caller.
        out: the rows of K and V.
        has_out: whether the caller passed `out`.
        table: the block table and its offsets, for a call without a plan.
    """
    tensors: list[Tensor] = []
    sizes: list[list[int | None]] = []
    strides: list[list[int | None]] = []
    for tensor in source:
        if isinstance(tensor, Tensor):
            tensors.append(tensor)
            sizes.append([*tensor.shape])
            strides.append([*tensor.stride()])
    for tensor in out if has_out else ():
        tensors.append(tensor)
        sizes.append([None, *tensor.shape[1:]])
        strides.append([*tensor.stride()])
    for tensor in table or ():
        if tensor is not None:
            tensors.append(tensor)
            sizes.append([None] * tensor.ndim)
            strides.append([None, None] if tensor.ndim == 2 else [*tensor.stride()])
    if len({id(tensor) for tensor in tensors}) < len(tensors) or (has_out and min(len(rows) for rows in out) < 2):
        return  # a guard takes no tensor twice, and the stride of a single row is arbitrary
    spans = [extent(t) * t.element_size() if isinstance(t, Tensor) else 0 for t in source]
    heads = geometry.num_kv_heads
    call = CheckedCall(
        launch, guard(tensors, sizes, strides), geometry.page_size, geometry.num_blocks, geometry.device,
        (spans[0], spans[1], spans[2], spans[3]), row_reach(out[0]), row_reach(out[1]),
        ((heads, geometry.head_dim), (heads, geometry.v_head_dim)), geometry.dtype.itemsize, out[0].element_size(),
        scales if geometry.device.type == "cpu" else None,
    )  # fmt: skip
    if len(_CALLS) >= 1024:
        _CALLS.clear()
    out_addresses = (out[0].data_ptr(), out[1].data_ptr()) if has_out else (0, 0)
    calls = _CALLS.setdefault(_key(options, source, _addresses(source), out_addresses, has_out, table), [])
    calls.insert(0, call)
    del calls[MAX_CALLS_PER_KEY:]


def forget() -> None:
    """Forget all calls. For tests that change the inputs of prepared launches."""
    _CALLS.clear()


def _key(
    options: Hashable, source: Source, addresses: tuple[Any, ...], out_addresses: tuple[int, int], has_out: bool,
    table: Table | None,
) -> Hashable:  # fmt: skip
    """The key of a call: the properties that a guard does not cover, which are options and alignments.

    Triton compiles separate kernels for addresses that are multiples of 16 and for others.
    """
    _, _, k_scale, v_scale = source
    k_address, v_address, k_scale_address, v_scale_address = addresses
    k_tensor, v_tensor = isinstance(k_scale, Tensor), isinstance(v_scale, Tensor)
    batch: Hashable = None
    if table is not None:
        block_table, cu_seqlens, starts, token_to_batch = table
        batch = (
            offset_lanes(block_table.shape[0]), block_table.data_ptr() & 15, cu_seqlens.data_ptr() & 15,
            starts is not None and starts.data_ptr() & 15, token_to_batch is None,
        )  # fmt: skip
    return (
        options, interpreting(), has_out, k_address & 15, v_address & 15, out_addresses[0] & 15, out_addresses[1] & 15,
        k_scale_address & 15 if k_tensor else type(k_scale), v_scale_address & 15 if v_tensor else type(v_scale), batch,
    )  # fmt: skip


def _addresses(source: Source) -> tuple[Any, ...]:
    """The addresses of both pools and both scales; the pool's address for no scale, the number for a number."""
    key_cache, value_cache, k_scale, v_scale = source
    k_address, v_address = key_cache.data_ptr(), value_cache.data_ptr()
    return (
        k_address, v_address,
        k_scale.data_ptr() if isinstance(k_scale, Tensor) else k_address if k_scale is None else k_scale,
        v_scale.data_ptr() if isinstance(v_scale, Tensor) else v_address if v_scale is None else v_scale,
    )  # fmt: skip


def gather_again(
    options: Hashable, source: Source, plan: GatherPlan, out: Sequence[Tensor] | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Gather by a plan if a matching call passed the checks; return None if this call needs the full checks.

    Args:
        options: all arguments that are neither tensors nor the plan.
        source, plan, out, out_dtype: as passed to `gather`.
    """
    if type(plan) is not GatherPlan or not (out is None or (type(out) in (tuple, list) and len(out) == 2)):
        return None
    rows = plan.total_tokens
    try:
        addresses = _addresses(source)
        out_addresses = (0, 0) if out is None else (out[0].data_ptr(), out[1].data_ptr())
        for call in _CALLS.get(_key(options, source, addresses, out_addresses, out is not None, None), ()):
            if call.matches(*_tensors(source), *(out or ())):
                break
        else:
            return None
    except ARGUMENT_ERRORS:
        return None
    if plan.page_size != call.page_size or plan.num_blocks > call.num_blocks:
        return None
    if plan.records.device != call.device or not _scales_are_valid(call, source):
        return None
    if out is None:
        k_shape, v_shape = call.shapes
        k_out = source[0].new_empty((rows, *k_shape), dtype=out_dtype)
        v_out = source[1].new_empty((rows, *v_shape), dtype=out_dtype)
        out_addresses = k_out.data_ptr(), v_out.data_ptr()
    else:
        k_out, v_out = out
    if not _memory_is_valid(call, source, addresses, k_out, v_out, out_addresses, rows):
        return None
    call.launch.from_records(plan.records, *_kernel_order(source, addresses, k_out, v_out, out_addresses))
    return k_out, v_out


def gather_table_again(options: Hashable, source: Source, out: tuple[Tensor, Tensor], table: Table, total: int) -> bool:
    """Gather by a block table if a matching call passed the checks; return False if this call needs the full checks.

    Args:
        options: all arguments that are not tensors, except the number of tokens.
        source, out, table, total: as passed to `cp_mha_gather_cache`.
    """
    if type(total) is not int or not 0 <= total <= MOST:
        return False
    block_table, cu_seqlens, starts, token_to_batch = table
    try:
        addresses, out_addresses = _addresses(source), (out[0].data_ptr(), out[1].data_ptr())
        for call in _CALLS.get(_key(options, source, addresses, out_addresses, True, table), ()):
            if call.matches(*_tensors(source), *out, *(t for t in table if t is not None)):
                break
        else:
            return False
    except ARGUMENT_ERRORS:
        return False
    if not _scales_are_valid(call, source):
        return False
    batch, columns = block_table.shape
    row_stride, column_stride = block_table.stride()
    fits = (
        row_stride <= MOST >= column_stride
        and inside(block_table, (batch - 1) * row_stride + (columns - 1) * column_stride if batch and columns else -1)
        and _indices_fit(cu_seqlens, batch + 1, batch + 1)
        and (starts is None or _indices_fit(starts, batch, batch))
        and (token_to_batch is None or _indices_fit(token_to_batch, total, MOST))
    )
    if not fits:
        return False
    if not _memory_is_valid(call, source, addresses, *out, out_addresses, total):
        return False
    pointers = _kernel_order(source, addresses, *out, out_addresses)
    call.launch.from_table(block_table, cu_seqlens, starts, call.num_blocks, total, *pointers)
    return True


def _tensors(source: Source) -> tuple[Any, ...]:
    """The tensors of a source, without None and numbers."""
    key_cache, value_cache, k_scale, v_scale = source
    if isinstance(k_scale, Tensor) and isinstance(v_scale, Tensor):
        return source
    return (key_cache, value_cache, *(scale for scale in (k_scale, v_scale) if isinstance(scale, Tensor)))


def _indices_fit(index: Tensor, minimum: int, maximum: int) -> bool:
    """Whether the number of indices is in [minimum, maximum], and all are inside their storage."""
    length = index.shape[0]
    return minimum <= length <= maximum and inside(index, (length - 1) * index.stride(0))


def _kernel_order(
    source: Source, addresses: tuple[Any, ...], k_out: Tensor, v_out: Tensor, out_addresses: tuple[int, int]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors and addresses in the order of the kernel's parameters; the pool stands in for a missing scale."""
    key_cache, value_cache, k_scale, v_scale = source
    return (
        (
            key_cache, key_cache if k_scale is None else k_scale, k_out,
            value_cache, value_cache if v_scale is None else v_scale, v_out,
        ),
        (addresses[0], addresses[2], out_addresses[0], addresses[1], addresses[3], out_addresses[1]),
    )  # fmt: skip


def _memory_is_valid(
    call: CheckedCall,
    source: Source,
    addresses: tuple[Any, ...],
    k_out: Tensor,
    v_out: Tensor,
    out_addresses: tuple[int, int],
    rows: int,
) -> bool:
    """Whether all tensors are inside their storage, and outputs have enough rows and share no memory with a tensor.

    Compares address ranges: False for interleaved views too, which the full checks accept.
    """
    key_cache, value_cache, k_scale, v_scale = source
    k_span, v_span, k_scale_span, v_scale_span = call.spans
    code_size, itemsize = call.code_size, call.itemsize
    k_rows, v_rows = k_out.shape[0], v_out.shape[0]
    if k_rows < rows or v_rows < rows:
        return False
    k_bytes = ((k_rows - 1) * k_out.stride(0) + call.k_reach) * itemsize if k_rows else 0
    v_bytes = ((v_rows - 1) * v_out.stride(0) + call.v_reach) * itemsize if v_rows else 0
    if (
        key_cache.storage_offset() * code_size + k_span > key_cache.untyped_storage().nbytes()
        or value_cache.storage_offset() * code_size + v_span > value_cache.untyped_storage().nbytes()
        or k_out.storage_offset() * itemsize + k_bytes > k_out.untyped_storage().nbytes()
        or v_out.storage_offset() * itemsize + v_bytes > v_out.untyped_storage().nbytes()
        or (
            isinstance(k_scale, Tensor)
            and k_scale.storage_offset() * 4 + k_scale_span > k_scale.untyped_storage().nbytes()
        )
        or (
            isinstance(v_scale, Tensor)
            and v_scale.storage_offset() * 4 + v_scale_span > v_scale.untyped_storage().nbytes()
        )
    ):
        return False
    (k_pool, v_pool, k_factor, v_factor), (k_begin, v_begin) = addresses, out_addresses
    k_end, v_end = k_begin + k_bytes, v_begin + v_bytes
    return not (
        (k_begin < v_end and v_begin < k_end)
        or (k_begin < k_pool + k_span and k_pool < k_end)
        or (v_begin < k_pool + k_span and k_pool < v_end)
        or (k_begin < v_pool + v_span and v_pool < k_end)
        or (v_begin < v_pool + v_span and v_pool < v_end)
        or (k_scale_span and k_begin < k_factor + k_scale_span and k_factor < k_end)
        or (k_scale_span and v_begin < k_factor + k_scale_span and k_factor < v_end)
        or (v_scale_span and k_begin < v_factor + v_scale_span and v_factor < k_end)
        or (v_scale_span and v_begin < v_factor + v_scale_span and v_factor < v_end)
    )


def _scales_are_valid(call: CheckedCall, source: Source) -> bool:
    """Whether the scales' values are valid, as far as this can be checked without synchronization."""
    _, _, k_scale, v_scale = source
    for scale in (k_scale, v_scale):
        if not (scale is None or isinstance(scale, Tensor) or (type(scale) is float and acceptable_number(scale))):
            return False
    if call.scales is None:
        return True
    try:
        for scale, resolved in zip((k_scale, v_scale), call.scales, strict=True):
            if isinstance(scale, Tensor) and resolved.kind in ("per-tensor", "per-head"):
                check_values(Scale.of(resolved.kind, scale), "scale")
    except (RuntimeError, ValueError):  # the full checks name the argument; its storage may have shrunk
        return False
    return True
