"""`prefix_attention`: write the new tokens, then attend to the cached and new tokens on one of three paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from ..batch.capture import check_may_create
from ..batch.pieces import Attend, Piece
from ..batch.refused import refuse_rows
from ..cache import PagedKVCache
from ..device import require_triton
from ..formats.checks import (
    check_choice,
    check_int,
    check_positive,
    check_tensor,
    check_window,
    described,
    extent,
    resolved,
)
from ..formats.fp8 import FLOATS
from ..formats.layout import Geometry
from ..gather.dispatch import check_made_for
from ..kernels.guards import guard_of
from ..kernels.signatures import signature
from ..scatter import SlotError
from .batch import PrefixBatch
from .choose import PATHS, Layer, Route, route_of
from .dense import dense_attention
from .merge import RunningState, apply_sinks

if TYPE_CHECKING:  # imports triton, which may be missing
    from .direct import DirectAgain


@overload
def prefix_attention(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None = ..., sinks: Tensor | None = ..., window: int | None = ...,
    workspace_tokens: int | None = ..., path: str = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def prefix_attention(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None = ..., sinks: Tensor | None = ..., window: int | None = ...,
    workspace_tokens: int | None = ..., path: str = ..., *, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def prefix_attention(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None = ..., sinks: Tensor | None = ..., window: int | None = ...,
    workspace_tokens: int | None = ..., path: str = ..., return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def prefix_attention(
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    cache: PagedKVCache,
    batch: PrefixBatch,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    workspace_tokens: int | None = None,
    path: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Write a batch's new tokens to the cache and attend to them and to all tokens before them.

    Args:
        q: `[batch.total_q, q_heads, head_dim]`, bfloat16, float16 or float32; `q_heads` a multiple of the KV heads.
        k_new, v_new: `[batch.total_q, kv_heads, head_dim]` and `[…, v_head_dim]`; both None if they are already in the
            cache.
        cache: the pools of the batch's block ids, with their scales.
        batch: from `PrefixBatch.build`, for this cache's page size.
        softmax_scale: factor of the scores, above 0; None means `head_dim ** -0.5`.
        sinks: `[q_heads]`, a logit per head that is added to the softmax denominator only.
        window: how many keys a query sees at most, itself included; None means all.
        workspace_tokens: upper bound of the tokens that one gather reads; None means no bound. A context of any length
            is supported: partial results are merged, and the sink is applied once, at the end. Must be at least 1, or
            the window; if the batch has no lengths, at least this for each sequence.
        path: "direct" reads the pages directly. "gather" gathers all tokens for a dense kernel. "hybrid" gathers the
            tokens that are cached at the beginning of every sequence, and reads the others directly from the pages; it
            reads all tokens directly if there is a window, or if the host does not know the lengths. "auto" takes the
            path with the shortest expected time, see `batch.explain`.
        return_lse: also return the log-sum-exp.

    Returns:
        out `[total_q, q_heads, v_head_dim]` in q's dtype, or (out, lse) with the natural log-sum-exp `[total_q,
        q_heads]` in FP32, which includes the sink. On every path, rows that belong to no sequence are 0 with lse −inf
        or the sink. NaN in out and in lse are: rows that see a key in a bad block, and all rows of a sequence that is
        longer than the batch's bounds or its row of the block table.

        K and V must be finite: a kernel multiplies masked values of V by 0, and 0 · NaN is NaN, so NaN in a token's V
        can reach the rows before it.

    Raises:
        TypeError, ValueError: an argument is wrong, or the combination is not supported; nothing is written or
            launched.
        CaptureError: a subclass of ValueError. A CUDA graph is being captured, and the batch lacks the layer's plans
            (see `PrefixBatch.prepare`); or the batch was built during a capture, and this call is not part of one.
    """
    arguments = q, k_new, v_new, cache, batch, softmax_scale, sinks, window, workspace_tokens, path
    out, lse = _written_and_attended(arguments, return_lse, None)
    assert out is not None
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


class StateInto(Protocol):
    """Where an output and its log-sum-exp go. One of its methods is called, or both; the last one counts."""

    def allocate(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
        """The addresses of both, given the shape and dtype of the output; each a multiple of 16 on a GPU."""

    def own(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both as tensors, contiguous."""


def partial_state(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None, sinks: Tensor | None, window: int | None, workspace_tokens: int | None, path: str,
    into: StateInto,
) -> None:  # fmt: skip
    """`prefix_attention` whose output and log-sum-exp, both without the sinks, are stored where the caller says.

    Args:
        sinks: checked as in `prefix_attention`; the caller applies them.
        into: called after the arguments were checked and the new tokens written, with `[total_q, q_heads, v_head_dim]`
            in q's dtype; the log-sum-exp is `[total_q, q_heads]` FP32.
        q, k_new, v_new, cache, batch, softmax_scale, window, workspace_tokens, path: as in `prefix_attention`.

    Raises:
        TypeError, ValueError, CaptureError: as `prefix_attention`.
    """
    arguments = q, k_new, v_new, cache, batch, softmax_scale, sinks, window, workspace_tokens, path
    _written_and_attended(arguments, True, into)


def _written_and_attended(
    arguments: tuple[Any, ...], want_lse: bool, into: StateInto | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the arguments of `prefix_attention`, write and attend.

    Returns:
        The output and its log-sum-exp, which may be None if it is not wanted; both None with `into`.
    """
    try:
        call = _checked_call(*arguments)
    except ValueError:
        if not any(isinstance(argument, Tensor) and argument.is_neg() for argument in arguments):
            raise
        plain = tuple(resolved(one) if isinstance(one, Tensor) else one for one in arguments)
        return _written_and_attended(plain, want_lse, into)
    q, k_new, v_new, cache, batch, _, sinks, _, _, path = arguments
    if batch.built_in_capture:
        check_may_create(batch.device, True, "attention")
    if call.route.path != "gather":
        require_triton(call.geometry.device, f'path="{path}"', '"gather" or "auto"')

    if k_new is not None and v_new is not None:
        _write(cache, k_new, v_new, batch, arguments)

    if into is not None:
        sinks = None
    again = call.again.get((want_lse, sinks is None))
    if again is not None:
        out: Tensor | None = None
        lse: Tensor | None = None
        if into is not None:
            out_at, lse_at = into.allocate(call.shape, q.dtype)
        else:
            out = q.new_empty(call.shape)
            lse = q.new_empty(call.shape[:2], dtype=torch.float32) if again.has_lse else None
            out_at, lse_at = out.data_ptr(), 0 if lse is None else lse.data_ptr()
        if again(q, batch, cache, sinks, out_at, lse_at):
            return out, lse

    state = None if into is None else into.own(call.shape, q.dtype)
    if call.route.path == "direct" and not call.has_no_keys:
        out, lse = _direct(q, cache, batch, call, sinks, want_lse, state)
        return (out, lse) if state is None else (None, None)
    if call.has_no_keys:
        out, lse = _without_keys(q, batch, call, sinks)
    elif call.route.path == "gather":
        out, lse = _gather(q, cache, batch, call, sinks)
    else:
        out, lse = _hybrid(q, cache, batch, call, sinks)
    if state is None:
        return out, lse
    assert lse is not None
    state[0].copy_(out)
    state[1].copy_(lse)
    return None, None


class _Call(NamedTuple):
    """The result of checking the arguments; the same for calls whose tensors differ only in their addresses.

    Attributes:
        geometry: the cache's.
        scale: the softmax scale.
        window: the window, or None.
        route: the path, and its plans.
        has_no_keys: whether no row can see a key.
        likeness: the cache's.
        shape: of the output.
        again: repeats the call on the direct path, by whether the log-sum-exp is wanted and whether there are no sinks.
    """

    geometry: Geometry
    scale: float
    window: int | None
    route: Route
    has_no_keys: bool
    likeness: int
    shape: tuple[int, int, int]
    again: dict[tuple[bool, bool], DirectAgain]


class _Known(NamedTuple):
    """A call that was checked, and what tells whether another one passes the same checks.

    Attributes:
        matches: the guard over the tensors that are not None.
        q, sinks: alignment, and bytes from the first to the last element.
        call: the result.
    """

    matches: Callable[..., bool]
    q: tuple[int, int]
    sinks: tuple[int, int] | None
    call: _Call


MOST_KNOWN = 8
"""Calls with equal options whose tensors differ, for example in strides; further ones are checked by signatures."""


def _checked_call(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None, sinks: Tensor | None, window: int | None, workspace_tokens: int | None, path: str,
) -> _Call:  # fmt: skip
    """`_check_call`, whose result is kept in the batch for calls with the same properties.

    `cache.write` checks the remaining properties of k_new and v_new.
    """
    arguments = q, k_new, v_new, cache, batch, softmax_scale, sinks, window, workspace_tokens, path
    if type(cache) is not PagedKVCache or type(batch) is not PrefixBatch:
        return _check_call(*arguments)
    try:
        options = (
            _likeness_of(cache), k_new is None, v_new is None, sinks is None,
            # True equals 1 as a key, but a window of True is rejected: types are part of the key.
            type(softmax_scale), softmax_scale, type(window), window, type(workspace_tokens), workspace_tokens, path,
        )  # fmt: skip
        calls: list[_Known] = batch.decided(("known", options), list)
        tensors: tuple[Tensor, ...] = (q,) if k_new is None or v_new is None else (q, k_new, v_new)
        if sinks is not None:
            tensors = (*tensors, sinks)
        if not torch.compiler.is_compiling():
            for known in calls:
                if known.matches(*tensors) and _in_memory(q, known.q) and _in_memory(sinks, known.sinks):
                    return known.call
        key = (
            "call", options, signature(q),
            None if k_new is None else (k_new.shape, k_new.dtype, k_new.device),
            None if v_new is None else (v_new.shape, v_new.dtype, v_new.device),
            None if sinks is None else signature(sinks),
        )  # fmt: skip
        call: _Call | None = batch.recall(key)
    except (AttributeError, RuntimeError, TypeError):  # an argument is not a tensor, or not hashable
        return _check_call(*arguments)
    if call is None:
        call = _check_call(*arguments)
        batch.decided(key, lambda: call)
    if len(calls) < MOST_KNOWN and (k_new is None) == (v_new is None) and not torch.compiler.is_compiling():
        matches = guard_of(tensors)
        if matches is not None:
            calls.append(_Known(matches, _memory(q), None if sinks is None else _memory(sinks), call))
    return call


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The alignment of a tensor, and the bytes from its first to its last element."""
    return tensor.data_ptr() & 15, extent(tensor) * tensor.element_size()


def _in_memory(tensor: Tensor | None, memory: tuple[int, int] | None) -> bool:
    """Whether a tensor that matches a guard has this alignment, and is inside its storage; None is."""
    if tensor is None or memory is None:
        return True
    alignment, size = memory
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr() & 15 == alignment and begin + size <= tensor.untyped_storage().nbytes()


def _check_call(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None, sinks: Tensor | None, window: int | None, workspace_tokens: int | None, path: str,
) -> _Call:  # fmt: skip
    """Check the arguments and choose the layer's route through the batch."""
    _check_tensors(q, k_new, v_new, cache, batch)
    g = cache.geometry
    scale = _softmax_scale(softmax_scale, g.head_dim)
    if sinks is not None:
        _check_sinks(sinks, q)
    window = check_window(window)
    if workspace_tokens is not None:
        workspace_tokens = check_int(workspace_tokens, "workspace_tokens", minimum=1)
    check_choice(path, "path", PATHS)
    route = route_of(batch, cache, Layer(q.shape[1], q.dtype, window, workspace_tokens, path))
    has_no_keys = batch.num_sequences == 0 or min(batch.max_q, batch.max_k) == 0
    shape = (q.shape[0], q.shape[1], g.v_head_dim)
    return _Call(g, scale, window, route, has_no_keys, _likeness_of(cache), shape, {})


def _check_sinks(sinks: object, q: Tensor) -> None:
    """Raise unless `sinks` is a tensor with a logit for each query head of `q`, on its device.

    Raises:
        TypeError, ValueError: it is not.
    """
    check_tensor(sinks, "sinks", ndim=1, dtypes=FLOATS, device=q.device)
    assert isinstance(sinks, Tensor)
    if sinks.shape[0] != q.shape[1]:
        raise ValueError(f"sinks has shape {list(sinks.shape)}; accepted for {q.shape[1]} query heads: one each")


def _likeness_of(cache: PagedKVCache) -> int:
    try:
        return cache.likeness
    except ValueError as error:  # names a pool or a scale, which are not arguments of this function
        raise ValueError(f"cache cannot be read: {error}") from None


def _write(cache: PagedKVCache, k_new: Tensor, v_new: Tensor, batch: PrefixBatch, arguments: tuple[Any, ...]) -> None:
    """Write the new tokens. Errors name the arguments of `prefix_attention`."""
    try:
        if not cache.write_again(k_new, v_new, batch.slots):
            cache.write(k_new, v_new, batch.slots)
    except SlotError as error:
        raise SlotError(f"batch puts new tokens where they cannot go: {error}") from None
    except (TypeError, ValueError) as error:
        _check_call(*arguments)  # raises an error that names k_new or v_new, if one of them is wrong
        raise type(error)(f"cache cannot be written: {error}") from None


def _check_tensors(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch
) -> None:
    """Raise unless the tensors, the cache and the batch match."""
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache is {described(cache)}; accepted: a PagedKVCache")
    if not isinstance(batch, PrefixBatch):
        raise TypeError(f"batch is {described(batch)}; accepted: a PrefixBatch, from PrefixBatch.build(...)")
    g = cache.geometry
    check_made_for(g, "batch", batch.page_size, batch.num_blocks, batch.device)
    rows = batch.total_q
    check_tensor(q, "q", ndim=3, dtypes=FLOATS, device=g.device)
    if q.shape[0] != rows or q.shape[2] != g.head_dim or q.shape[1] % g.num_kv_heads or q.shape[1] == 0:
        raise ValueError(
            f"q has shape {list(q.shape)}; accepted for total_q {rows}: [{rows}, a multiple of {g.num_kv_heads} heads, "
            f"{g.head_dim}]"
        )
    if (k_new is None) != (v_new is None):
        missing, present = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        raise TypeError(f"{missing} is None and {present} is not; accepted: both, or neither (already in the cache)")
    for name, tensor, dim in (("k_new", k_new, g.head_dim), ("v_new", v_new, g.v_head_dim)):
        if tensor is None:
            continue
        check_tensor(tensor, name, ndim=3, dtypes=FLOATS, device=g.device)
        if tuple(tensor.shape) != (rows, g.num_kv_heads, dim):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted for total_q {rows}: [{rows}, {g.num_kv_heads}, {dim}]"
            )


def _softmax_scale(softmax_scale: object, head_dim: int) -> float:
    if softmax_scale is None:
        return float(head_dim**-0.5)
    # Kernels multiply the largest product of a row by the scale to get the largest score, so the scale is positive.
    return check_positive(softmax_scale, "softmax_scale", "None, or a number")


def _contiguous_dims(q: Tensor) -> Tensor:
    return q if q.stride(2) == 1 else q.contiguous()


@torch.no_grad()
def _without_keys(q: Tensor, batch: PrefixBatch, call: _Call, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the result if no row can see a key: 0, and −inf or the sink."""
    state = RunningState(q.shape[0], q.shape[1], call.geometry.v_head_dim, q.dtype, q.device)
    out, lse = apply_sinks(state.out, state.lse, sinks) if sinks is not None else (state.out, state.lse)
    refuse_rows(out, lse, batch.cu_seqlens_q, batch.max_q)
    return out, lse


def _direct(
    q: Tensor, cache: PagedKVCache, batch: PrefixBatch, call: _Call, sinks: Tensor | None, want_lse: bool,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attend directly from the pages. The log-sum-exp may be None if it is not wanted."""
    rows = _contiguous_dims(q)
    remember = functools.partial(call.again.__setitem__, (want_lse, sinks is None)) if rows is q else None
    return _direct_attention()(
        rows, cache, batch, softmax_scale=call.scale, sinks=sinks, window=call.window, likeness=call.likeness,
        want_lse=want_lse, into=into, remember=remember,
    )  # fmt: skip


@torch.no_grad()
def _gather(
    q: Tensor, cache: PagedKVCache, batch: PrefixBatch, call: _Call, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gather each piece into one workspace and attend to it, merge the results, and apply the sinks once."""
    assert call.route.pieces is not None
    q, g, pieces = _contiguous_dims(q), call.geometry, call.route.pieces
    k, v = (q.new_empty((pieces.capacity, g.num_kv_heads, dim)) for dim in (g.head_dim, g.v_head_dim))
    if pieces.is_single_call(len(q)):
        (piece,) = pieces.pieces
        cache.gather_for_attention(piece.plan, out_dtype=q.dtype, out=(k, v))
        out, lse = _dense(q, k, v, piece, piece.attends[0], call.scale)
    else:
        state_dtype = torch.float32 if pieces.merged else q.dtype
        state = RunningState(q.shape[0], q.shape[1], g.v_head_dim, state_dtype, q.device)
        for piece in pieces.pieces:
            cache.gather_for_attention(piece.plan, out_dtype=q.dtype, out=(k, v))
            for attend in piece.attends:
                partial_state = _dense(q, k, v, piece, attend, call.scale)
                if pieces.merged:
                    state.add(attend.rows, *partial_state)
                else:
                    state.put(attend.rows, *partial_state)
                del partial_state  # frees its memory for the next one
        out, lse = state.out, state.lse
        del state
    del k, v
    if sinks is not None:
        out, lse = apply_sinks(out, lse, sinks)
    out = out.to(q.dtype)
    refuse_rows(out, lse, batch.cu_seqlens_q, batch.max_q)
    return out, lse


@torch.no_grad()
def _hybrid(
    q: Tensor, cache: PagedKVCache, batch: PrefixBatch, call: _Call, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gather the part that all sequences have cached and attend without a mask; then attend to the rest by pages."""
    assert call.route.common is not None
    q, (piece, begin) = _contiguous_dims(q), call.route.common
    k, v = cache.gather_for_attention(piece.plan, out_dtype=q.dtype)
    out, lse = _dense(q, k, v, piece, piece.attends[0], call.scale)
    del k, v
    state = out.contiguous(), lse.contiguous()  # the flash kernel stores the log-sum-exp head by head
    return _direct_attention()(q, cache, batch, softmax_scale=call.scale, sinks=sinks, begin=begin, state=state)


def _dense(q: Tensor, k: Tensor, v: Tensor, piece: Piece, attend: Attend, scale: float) -> tuple[Tensor, Tensor]:
    return dense_attention(
        q[attend.rows], k[: piece.plan.total_tokens], v[: piece.plan.total_tokens],
        attend.cu_seqlens_q, attend.cu_seqlens_k, max_q=attend.max_q, max_k=attend.max_k, softmax_scale=scale,
        causal=attend.causal, window=attend.window, seqlens_q=attend.seqlens_q, seqlens_k=attend.seqlens_k,
    )  # fmt: skip


@functools.cache
def _direct_attention() -> Any:
    from .direct import direct_attention  # imports triton, which may be missing

    return direct_attention
