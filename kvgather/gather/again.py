"""Calls that were checked before: what an engine does once a layer, without the checks that cannot fail again.

Every check of a call looks at what a guard looks at (`kernels.guards`), except six: addresses and memory, sizes that
change with the batch, values of scales on a CPU, numbers, and whether an output shares memory with something else. So
a call whose tensors are like those of one that passed is checked for these alone. Whatever is unusual goes back to the
full checks, which say what is wrong.
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

if TYPE_CHECKING:  # the kernel needs Triton, which is not everywhere
    from .kernel import GatherLaunch

Source = tuple[Tensor, Tensor, Tensor | float | None, Tensor | float | None]
"""K's and V's pools, K's and V's scales, as they were given."""
Table = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A block table, its offsets, its starts, and the sequence of each token."""

NOT_TENSORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What comes of an argument that is not what it should be; the full checks name it."""
KEPT = 64
"""Calls that are remembered of one meaning; an engine has one for each kind of layer and alignment of its outputs."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of a call that passed every check.

    Attributes:
        launch: its kernel.
        looks_like: whether other tensors are like its own.
        page_size, num_blocks, device: of its pools.
        spans: bytes from the first to the last, of the pools and of the scales; 0 for no scale.
        k_reach, v_reach: elements from the first to the last of an output's row.
        shapes: of a row, of K and of V.
        code_size, itemsize: bytes of an element of the pools, and of the outputs.
        scales: as they were resolved, where values have to be looked at in each call.
    """

    launch: GatherLaunch
    looks_like: Callable[..., bool]
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


_KNOWN: dict[Hashable, list[Known]] = {}


def remember(
    meaning: Hashable,
    launch: GatherLaunch,
    geometry: Geometry,
    source: Source,
    scales: tuple[Scale, Scale],
    out: Sequence[Tensor],
    given_out: bool,
    table: Table | None = None,
) -> None:
    """Keep what calls need that differ from this one in addresses and in the size of the batch alone.

    Args:
        meaning: every argument that is no tensor, as `gather_again` or `gather_table_again` takes it.
        launch: what the call launched.
        geometry, scales: of its cache, resolved.
        source, table: as they were given; a table where there is no plan.
        out: K's and V's rows.
        given_out: whether the caller gave them.
    """
    tensors: list[Tensor] = []
    sizes: list[list[int | None]] = []
    strides: list[list[int | None]] = []
    for tensor in source:
        if isinstance(tensor, Tensor):
            tensors.append(tensor)
            sizes.append([*tensor.shape])
            strides.append([*tensor.stride()])
    for tensor in out if given_out else ():
        tensors.append(tensor)
        sizes.append([None, *tensor.shape[1:]])
        strides.append([*tensor.stride()])
    for tensor in table or ():
        if tensor is not None:
            tensors.append(tensor)
            sizes.append([None] * tensor.ndim)
            strides.append([None, None] if tensor.ndim == 2 else [*tensor.stride()])
    if len({id(tensor) for tensor in tensors}) < len(tensors) or (given_out and min(len(rows) for rows in out) < 2):
        return  # one tensor for two arguments, or one row, whose stride says nothing: not worth remembering
    spans = [extent(t) * t.element_size() if isinstance(t, Tensor) else 0 for t in source]
    heads = geometry.num_kv_heads
    known = Known(
        launch, guard(tensors, sizes, strides), geometry.page_size, geometry.num_blocks, geometry.device,
        (spans[0], spans[1], spans[2], spans[3]), row_reach(out[0]), row_reach(out[1]),
        ((heads, geometry.head_dim), (heads, geometry.v_head_dim)), geometry.dtype.itemsize, out[0].element_size(),
        scales if geometry.device.type == "cpu" else None,
    )  # fmt: skip
    if len(_KNOWN) >= 1024:
        _KNOWN.clear()
    rows = (out[0].data_ptr(), out[1].data_ptr()) if given_out else (0, 0)
    calls = _KNOWN.setdefault(_key(meaning, source, _addresses(source), rows, given_out, table), [])
    calls.insert(0, known)
    del calls[KEPT:]


def forget() -> None:
    """Forget all calls: for tests that change what launches are prepared from."""
    _KNOWN.clear()


def _key(
    meaning: Hashable, source: Source, at: tuple[Any, ...], rows_at: tuple[int, int], given_out: bool,
    table: Table | None,
) -> Hashable:  # fmt: skip
    """What tells calls apart besides what a guard looks at: what is no tensor, and how tensors are aligned.

    Triton compiles for an address that is a multiple of 16 apart from one that is not.
    """
    _, _, k_scale, v_scale = source
    k_at, v_at, k_scale_at, v_scale_at = at
    k_tensor, v_tensor = isinstance(k_scale, Tensor), isinstance(v_scale, Tensor)
    batch: Hashable = None
    if table is not None:
        block_table, cu_seqlens, starts, token_to_batch = table
        batch = (
            offset_lanes(block_table.shape[0]), block_table.data_ptr() & 15, cu_seqlens.data_ptr() & 15,
            starts is not None and starts.data_ptr() & 15, token_to_batch is None,
        )  # fmt: skip
    return (
        meaning, interpreting(), given_out, k_at & 15, v_at & 15, rows_at[0] & 15, rows_at[1] & 15,
        k_scale_at & 15 if k_tensor else type(k_scale), v_scale_at & 15 if v_tensor else type(v_scale), batch,
    )  # fmt: skip


def _addresses(source: Source) -> tuple[Any, ...]:
    """Where K's and V's pool and K's and V's scale are; the pool's address for no scale, and a number as it is."""
    key_cache, value_cache, k_scale, v_scale = source
    k_at, v_at = key_cache.data_ptr(), value_cache.data_ptr()
    return (
        k_at, v_at,
        k_scale.data_ptr() if isinstance(k_scale, Tensor) else k_at if k_scale is None else k_scale,
        v_scale.data_ptr() if isinstance(v_scale, Tensor) else v_at if v_scale is None else v_scale,
    )  # fmt: skip


def gather_again(
    meaning: Hashable, source: Source, plan: GatherPlan, out: Sequence[Tensor] | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """A planned gather whose like passed the checks; None when it has to go through them.

    Args:
        meaning: every argument that is neither a tensor nor the plan.
        source, plan, out, out_dtype: as given to `gather`.
    """
    if type(plan) is not GatherPlan or not (out is None or (type(out) in (tuple, list) and len(out) == 2)):
        return None
    rows = plan.total_tokens
    try:
        at = _addresses(source)
        rows_at = (0, 0) if out is None else (out[0].data_ptr(), out[1].data_ptr())
        for known in _KNOWN.get(_key(meaning, source, at, rows_at, out is not None, None), ()):
            if known.looks_like(*_tensors(source), *(out or ())):
                break
        else:
            return None
    except NOT_TENSORS:
        return None
    if plan.page_size != known.page_size or plan.num_blocks > known.num_blocks:
        return None
    if plan.records.device != known.device or not _scales_are_good(known, source):
        return None
    if out is None:
        k_shape, v_shape = known.shapes
        k_out = source[0].new_empty((rows, *k_shape), dtype=out_dtype)
        v_out = source[1].new_empty((rows, *v_shape), dtype=out_dtype)
        rows_at = k_out.data_ptr(), v_out.data_ptr()
    else:
        k_out, v_out = out
    if not _memory_is_good(known, source, at, k_out, v_out, rows_at, rows):
        return None
    known.launch.from_records(plan.records, *_in_order(source, at, k_out, v_out, rows_at))
    return k_out, v_out


def gather_table_again(meaning: Hashable, source: Source, out: tuple[Tensor, Tensor], table: Table, total: int) -> bool:
    """A gather by block table whose like passed the checks; False when it has to go through them.

    Args:
        meaning: every argument that is no tensor, except the number of tokens.
        source, out, table, total: as given to `cp_mha_gather_cache`.
    """
    if type(total) is not int or not 0 <= total <= MOST:
        return False
    block_table, cu_seqlens, starts, token_to_batch = table
    try:
        at, rows_at = _addresses(source), (out[0].data_ptr(), out[1].data_ptr())
        for known in _KNOWN.get(_key(meaning, source, at, rows_at, True, table), ()):
            if known.looks_like(*_tensors(source), *out, *(t for t in table if t is not None)):
                break
        else:
            return False
    except NOT_TENSORS:
        return False
    if not _scales_are_good(known, source):
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
    if not _memory_is_good(known, source, at, *out, rows_at, total):
        return False
    pointers = _in_order(source, at, *out, rows_at)
    known.launch.from_table(block_table, cu_seqlens, starts, known.num_blocks, total, *pointers)
    return True


def _tensors(source: Source) -> tuple[Any, ...]:
    """What of a source is a tensor."""
    key_cache, value_cache, k_scale, v_scale = source
    if isinstance(k_scale, Tensor) and isinstance(v_scale, Tensor):
        return source
    return (key_cache, value_cache, *(scale for scale in (k_scale, v_scale) if isinstance(scale, Tensor)))


def _indices_fit(index: Tensor, least: int, most: int) -> bool:
    """Whether there are so many indices, all inside their memory."""
    length = index.shape[0]
    return least <= length <= most and inside(index, (length - 1) * index.stride(0))


def _in_order(
    source: Source, at: tuple[Any, ...], k_out: Tensor, v_out: Tensor, rows_at: tuple[int, int]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors and their addresses as the kernel takes them; a pool stands in for a scale that is never read."""
    key_cache, value_cache, k_scale, v_scale = source
    return (
        (
            key_cache, key_cache if k_scale is None else k_scale, k_out,
            value_cache, value_cache if v_scale is None else v_scale, v_out,
        ),
        (at[0], at[2], rows_at[0], at[1], at[3], rows_at[1]),
    )  # fmt: skip


def _memory_is_good(
    known: Known, source: Source, at: tuple[Any, ...], k_out: Tensor, v_out: Tensor, rows_at: tuple[int, int], rows: int
) -> bool:
    """Whether everything is inside its memory, outputs have enough rows, and certainly share memory with nothing."""
    key_cache, value_cache, k_scale, v_scale = source
    k_span, v_span, k_scale_span, v_scale_span = known.spans
    code_size, itemsize = known.code_size, known.itemsize
    k_rows, v_rows = k_out.shape[0], v_out.shape[0]
    if k_rows < rows or v_rows < rows:
        return False
    k_bytes = ((k_rows - 1) * k_out.stride(0) + known.k_reach) * itemsize if k_rows else 0
    v_bytes = ((v_rows - 1) * v_out.stride(0) + known.v_reach) * itemsize if v_rows else 0
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
    (k_pool, v_pool, k_factor, v_factor), (k_begin, v_begin) = at, rows_at
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


def _scales_are_good(known: Known, source: Source) -> bool:
    """Whether scales hold values that a scale may have, as far as that can be seen without a wait."""
    _, _, k_scale, v_scale = source
    for scale in (k_scale, v_scale):
        if not (scale is None or isinstance(scale, Tensor) or (type(scale) is float and acceptable_number(scale))):
            return False
    if known.scales is None:
        return True
    try:
        for scale, resolved in zip((k_scale, v_scale), known.scales, strict=True):
            if isinstance(scale, Tensor) and resolved.kind in ("per-tensor", "per-head"):
                check_values(Scale.of(resolved.kind, scale), "scale")
    except (RuntimeError, ValueError):  # the full checks name the argument, whose memory may be gone
        return False
    return True
