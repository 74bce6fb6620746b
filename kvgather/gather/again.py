"""Calls that were checked before: what an engine does once a layer, without the checks that cannot fail again.

Every check of a call looks at what a `signature` says, except four: sizes that change with the batch, values of scales
on a CPU, numbers, and whether an output shares memory with something else. So a call whose signatures are those of one
that passed is checked for these four alone. Whatever is unusual goes back to the full checks, which say what is wrong.

Attributes of a tensor take 0.1 to 0.2 µs each, and seven to ten tensors come with a call: each is read once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device import interpreting
from ..formats.checks import extent
from ..formats.layout import Geometry
from ..formats.scale import Scale, acceptable_number, check_values
from ..kernels.signatures import MOST, row_reach, signature
from ..plan import GatherPlan

if TYPE_CHECKING:  # the kernel needs Triton, which is not everywhere
    from .kernel import GatherLaunch

Source = tuple[Tensor, Tensor, Tensor | float | None, Tensor | float | None]
"""K's and V's pools, K's and V's scales, as they were given."""

NOT_TENSORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What comes of an argument that is not what it should be; the full checks name it."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of a call that passed every check.

    Attributes:
        launch: its kernel.
        page_size, num_blocks, device: of its pools.
        spans: bytes from the first to the last, of the pools and of the scales.
        k_reach, v_reach: elements from the first to the last of an output's row.
        shapes: of a row, of K and of V.
        itemsize: of the outputs.
        scales: as they were resolved, where values have to be looked at in each call.
    """

    launch: GatherLaunch
    page_size: int
    num_blocks: int
    device: torch.device
    spans: tuple[int, int, int, int]
    k_reach: int
    v_reach: int
    shapes: tuple[tuple[int, int], tuple[int, int]]
    itemsize: int
    scales: tuple[Scale, Scale] | None


_KNOWN: dict[Hashable, Known] = {}


def remember(
    key: Hashable, launch: GatherLaunch, geometry: Geometry, source: Source, scales: tuple[Scale, Scale],
    out: Sequence[Tensor],
) -> None:  # fmt: skip
    """Keep what calls need that differ from this one in addresses and in the size of the batch alone.

    Args:
        key: from `planned_key` or `table_key`.
        launch: what the call launched.
        geometry, source, scales, out: its pools, scales and outputs, which passed every check.
    """
    if len(_KNOWN) >= 1024:  # an engine has some dozens; a test suite with every shape there is has more
        _KNOWN.clear()
    spans = [extent(t) * t.element_size() if isinstance(t, Tensor) else 0 for t in source]
    heads = geometry.num_kv_heads
    _KNOWN[key] = Known(
        launch, geometry.page_size, geometry.num_blocks, geometry.device, (spans[0], spans[1], spans[2], spans[3]),
        row_reach(out[0]), row_reach(out[1]), ((heads, geometry.head_dim), (heads, geometry.v_head_dim)),
        out[0].element_size(), scales if geometry.device.type == "cpu" else None,
    )  # fmt: skip


def forget() -> None:
    """Forget all calls: for tests that change what launches are prepared from."""
    _KNOWN.clear()


def planned_key(meaning: Hashable, source: Source, out: Sequence[Tensor] | None) -> Hashable:
    """What tells planned gathers apart.

    Args:
        meaning: every argument that is neither a tensor nor the plan.
        source, out: as they were given.
    """
    return (meaning, interpreting(), *_source_key(source), out and (_out_key(out[0]), _out_key(out[1])))


def table_key(
    meaning: Hashable, source: Source, out: Sequence[Tensor], table: Tensor, cu_seqlens: Tensor,
    starts: Tensor | None, token_to_batch: Tensor | None,
) -> Hashable:  # fmt: skip
    """What tells gathers by block table apart; arguments as in `gather_table_again`."""
    row_stride, column_stride = table.stride()
    return (
        meaning, interpreting(), *_source_key(source), _out_key(out[0]), _out_key(out[1]),
        type(table), table.dtype, table.device, table.data_ptr() & 15, table.shape[0] <= 32,
        row_stride > MOST or column_stride > MOST,
        _index_key(cu_seqlens), starts is not None and _index_key(starts),
        token_to_batch is not None and _index_key(token_to_batch),
    )  # fmt: skip


def _source_key(source: Source) -> tuple[object, object, object, object]:
    key_cache, value_cache, k_scale, v_scale = source
    return (
        signature(key_cache), signature(value_cache),
        signature(k_scale) if isinstance(k_scale, Tensor) else type(k_scale),
        signature(v_scale) if isinstance(v_scale, Tensor) else type(v_scale),
    )  # fmt: skip


def _out_key(out: Tensor) -> Hashable:
    """`signature` without the number of rows, and without the memory that has to hold them."""
    rows, heads, dim = out.shape
    return (
        type(out), out.dtype, out.device, heads, dim, out.stride(), out.data_ptr() & 15, out.is_neg(), rows > 1,
    )  # fmt: skip


def _index_key(index: Tensor) -> Hashable:
    """`signature` of offsets, starts and the like, without their number."""
    return type(index), index.dtype, index.device, index.stride(), index.data_ptr() & 15


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
    try:
        known = _KNOWN.get(planned_key(meaning, source, out))
    except NOT_TENSORS:
        return None
    if known is None or plan.page_size != known.page_size or plan.num_blocks > known.num_blocks:
        return None
    records, rows = plan.records, plan.total_tokens
    if records.device != known.device or not _values_are_good(known, source):
        return None
    if out is None:
        k_shape, v_shape = known.shapes
        k_out = source[0].new_empty((rows, *k_shape), dtype=out_dtype)
        v_out = source[1].new_empty((rows, *v_shape), dtype=out_dtype)
    else:
        k_out, v_out = out
    tensors, addresses = _pointers(source, k_out, v_out)
    if out is not None and not _rows_are_good(known, k_out, v_out, rows, addresses):
        return None
    known.launch.from_records(records, tensors, addresses)
    return k_out, v_out


def gather_table_again(
    meaning: Hashable, source: Source, out: Sequence[Tensor], table: Tensor, cu_seqlens: Tensor,
    starts: Tensor | None, token_to_batch: Tensor | None, total: int,
) -> bool:  # fmt: skip
    """A gather by block table whose like passed the checks; False when it has to go through them.

    Args:
        meaning: every argument that is no tensor, except the number of tokens.
        source, out, table, cu_seqlens, starts, token_to_batch, total: as given to `cp_mha_gather_cache`.
    """
    if type(total) is not int or not 0 <= total <= MOST:
        return False
    try:
        known = _KNOWN.get(table_key(meaning, source, out, table, cu_seqlens, starts, token_to_batch))
    except NOT_TENSORS:
        return False
    if known is None or not _values_are_good(known, source):
        return False
    batch, columns = table.shape
    row_stride, column_stride = table.stride()
    fits = (
        inside(table, (batch - 1) * row_stride + (columns - 1) * column_stride if batch and columns else -1)
        and _indices_fit(cu_seqlens, batch + 1, batch + 1)
        and (starts is None or _indices_fit(starts, batch, batch))
        and (token_to_batch is None or _indices_fit(token_to_batch, total, MOST))
    )
    if not fits:
        return False
    k_out, v_out = out
    tensors, addresses = _pointers(source, k_out, v_out)
    if not _rows_are_good(known, k_out, v_out, total, addresses):
        return False
    known.launch.from_table(table, cu_seqlens, starts, known.num_blocks, total, tensors, addresses)
    return True


def inside(tensor: Tensor, last: int) -> bool:
    """Whether the element at `last`, counted from the tensor's first, is inside its memory; −1 is none."""
    end = (tensor.storage_offset() + last + 1) * tensor.element_size() if last >= 0 else 0
    return end <= tensor.untyped_storage().nbytes()


def _indices_fit(index: Tensor, least: int, most: int) -> bool:
    """Whether there are so many indices, all inside their memory."""
    length = index.shape[0]
    return least <= length <= most and inside(index, (length - 1) * index.stride(0))


def _pointers(source: Source, k_out: Tensor, v_out: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors and their addresses as the kernel takes them; a pool stands in for a scale that is never read."""
    key_cache, value_cache, k_scale, v_scale = source
    k_at, v_at = key_cache.data_ptr(), value_cache.data_ptr()
    if k_scale is None:
        k_scale = key_cache
    if v_scale is None:
        v_scale = value_cache
    k_scale_at = k_scale.data_ptr() if isinstance(k_scale, Tensor) else k_scale
    v_scale_at = v_scale.data_ptr() if isinstance(v_scale, Tensor) else v_scale
    return (
        (key_cache, k_scale, k_out, value_cache, v_scale, v_out),
        (k_at, k_scale_at, k_out.data_ptr(), v_at, v_scale_at, v_out.data_ptr()),
    )


def _rows_are_good(known: Known, k_out: Tensor, v_out: Tensor, rows: int, addresses: tuple[Any, ...]) -> bool:
    """Whether outputs have enough rows, inside their memory, and certainly share none of it with anything else."""
    k_rows, v_rows = k_out.shape[0], v_out.shape[0]
    if k_rows < rows or v_rows < rows:
        return False
    k_last = (k_rows - 1) * k_out.stride(0) + known.k_reach - 1 if k_rows else -1
    v_last = (v_rows - 1) * v_out.stride(0) + known.v_reach - 1 if v_rows else -1
    if not (inside(k_out, k_last) and inside(v_out, v_last)):
        return False
    k_pool, k_scale, k_begin, v_pool, v_scale, v_begin = addresses
    k_end, v_end = k_begin + (k_last + 1) * known.itemsize, v_begin + (v_last + 1) * known.itemsize
    k_span, v_span, k_scale_span, v_scale_span = known.spans
    return not (
        (k_begin < v_end and v_begin < k_end)
        or (k_begin < k_pool + k_span and k_pool < k_end)
        or (v_begin < k_pool + k_span and k_pool < v_end)
        or (k_begin < v_pool + v_span and v_pool < k_end)
        or (v_begin < v_pool + v_span and v_pool < v_end)
        or (k_scale_span and k_begin < k_scale + k_scale_span and k_scale < k_end)
        or (k_scale_span and v_begin < k_scale + k_scale_span and k_scale < v_end)
        or (v_scale_span and k_begin < v_scale + v_scale_span and v_scale < k_end)
        or (v_scale_span and v_begin < v_scale + v_scale_span and v_scale < v_end)
    )


def _values_are_good(known: Known, source: Source) -> bool:
    """Whether scales hold values that a scale may have, as far as that can be seen without a wait."""
    _, _, k_scale, v_scale = source
    if type(k_scale) is float and not acceptable_number(k_scale):
        return False
    if type(v_scale) is float and not acceptable_number(v_scale):
        return False
    if known.scales is None:
        return True
    try:
        for scale, resolved in zip((k_scale, v_scale), known.scales, strict=True):
            if isinstance(scale, Tensor) and resolved.kind in ("per-tensor", "per-head"):
                check_values(Scale.of(resolved.kind, scale), "scale")
    except ValueError:  # the full checks name the argument
        return False
    return True
