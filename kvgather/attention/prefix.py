"""The prefix path: write the new tokens, read them together with the cached ones, attend."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import PagedKVCache
from ..device import require_triton
from ..formats.checks import check_choice, check_int, check_positive, check_tensor, check_window, described, resolved
from ..formats.fp8 import FLOATS
from ..formats.layout import Geometry
from ..gather.dispatch import check_made_for
from ..kernels.signatures import signature
from ..scatter import SlotError
from .batch import PrefixBatch
from .capture import check_may_make
from .choose import PATHS
from .dense import dense_attention
from .merge import apply_sinks
from .pieces import Attend, Piece, Pieces
from .refused import refuse_rows
from .route import Common, Layer, Route, route_of
from .states import RunningState


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
    """Write a batch's new tokens to the cache and attend to them and to everything before them.

    Args:
        q: `[batch.total_q, q_heads, head_dim]`, bfloat16, float16 or float32; `q_heads` a multiple of the KV heads.
        k_new, v_new: `[batch.total_q, kv_heads, head_dim]` and `[…, v_head_dim]`; both None when they are in the cache
            already.
        cache: what the batch's block ids point into. Its scales say themselves of which kind they are.
        batch: from `PrefixBatch.build`, for this cache's page size.
        softmax_scale: what scores are multiplied by, above 0; None is `head_dim ** -0.5`.
        sinks: `[q_heads]`, a logit per head that counts in the denominator alone.
        window: how many keys a query sees at most, itself included; None is all.
        workspace_tokens: at most so many tokens are gathered at a time; None is all at once. Any context fits: partial
            results are merged, and the sink enters once, at the end. It must hold one token, or the window, if there is
            one; and that for each sequence where the batch does not know their lengths.
        path: "gather", "direct" (straight from the pages), or "auto": the faster one, see `batch.explain`.
        return_lse: also return the log-sum-exp.

    Returns:
        out `[total_q, q_heads, v_head_dim]` in q's dtype, or (out, lse) with the natural log-sum-exp, the sink's
        included, `[total_q, q_heads]` FP32. Rows that belong to no sequence are 0 (and −inf, or the sink); rows that
        need a bad block id are NaN, and so are all rows of a sequence that is longer than the batch's bounds.

        K and V have to be finite: a kernel multiplies what it masks by 0, and 0 · NaN is NaN, so NaN in a token's V may
        reach the rows before it.

    Raises:
        TypeError, ValueError: an argument is wrong, or the combination not supported; nothing was written or launched.
        CaptureError: a ValueError: a CUDA graph is being captured, and the batch lacks what the layer needs: see
            `PrefixBatch.prepare`. Or the batch was built in a capture, and this call is not part of one.
    """
    arguments = q, k_new, v_new, cache, batch, softmax_scale, sinks, window, workspace_tokens, path
    try:
        call = _recalled(*arguments)
    except ValueError:
        read = q, k_new, v_new, sinks
        if not any(isinstance(tensor, Tensor) and tensor.is_neg() for tensor in read):
            raise
        return prefix_attention(
            resolved(q), resolved(k_new), resolved(v_new), cache, batch, softmax_scale, resolved(sinks), window,
            workspace_tokens, path, return_lse,
        )  # fmt: skip
    if batch.built_in_capture:
        check_may_make(batch.device, True, "attention")
    if call.route.direct:
        require_triton(call.geometry.device, 'path="direct"', '"gather" or "auto"')

    if k_new is not None and v_new is not None:
        try:
            if not cache.write_again(k_new, v_new, batch.slots):
                cache.write(k_new, v_new, batch.slots)
        except SlotError as error:
            raise SlotError(f"batch puts new tokens where they cannot go: {error}") from None
        except (TypeError, ValueError) as error:
            _checked(*arguments)  # which knows the names of these arguments
            raise type(error)(f"cache cannot be written: {error}") from None
    if call.route.direct and not call.sees_nothing:
        out, lse = _direct(q, cache, batch, call.scale, sinks, call.window, call.likeness)
    else:
        out, lse = _dense_path(q, cache, batch, call, sinks)
    return (out, lse) if return_lse else out


class _Call(NamedTuple):
    """What checked arguments come to; equal for all calls whose tensors differ in their addresses alone."""

    geometry: Geometry
    scale: float
    window: int | None
    route: Route
    sees_nothing: bool
    likeness: int


def _recalled(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None, sinks: Tensor | None, window: int | None, workspace_tokens: int | None, path: str,
) -> _Call:  # fmt: skip
    """`_checked`, once for arguments that are alike in everything it looks at; the rest of k_new and v_new is looked at
    by `cache.write`."""
    arguments = q, k_new, v_new, cache, batch, softmax_scale, sinks, window, workspace_tokens, path
    if type(cache) is not PagedKVCache or type(batch) is not PrefixBatch:
        return _checked(*arguments)
    try:
        key = (
            "call", _likeness_of(cache), signature(q),
            None if k_new is None else (k_new.shape, k_new.dtype, k_new.device),
            None if v_new is None else (v_new.shape, v_new.dtype, v_new.device),
            None if sinks is None else signature(sinks),
            # True is 1 to a dictionary, and a window of True is refused: so types are part of it.
            type(softmax_scale), softmax_scale, type(window), window, type(workspace_tokens), workspace_tokens, path,
        )  # fmt: skip
        call: _Call | None = batch.recall(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or nothing that a dictionary takes
        return _checked(*arguments)
    if call is None:
        call = _checked(*arguments)
        batch.decided(key, lambda: call)
    return call


def _checked(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
    softmax_scale: float | None, sinks: Tensor | None, window: int | None, workspace_tokens: int | None, path: str,
) -> _Call:  # fmt: skip
    """Check the arguments, and find the layer's way through the batch."""
    _check(q, k_new, v_new, cache, batch)
    g = cache.geometry
    scale = _softmax_scale(softmax_scale, g.head_dim)
    if sinks is not None:
        check_tensor(sinks, "sinks", ndim=1, dtypes=FLOATS, device=g.device)
        if sinks.shape[0] != q.shape[1]:
            raise ValueError(f"sinks has shape {list(sinks.shape)}; accepted for {q.shape[1]} query heads: one each")
    window = check_window(window)
    if workspace_tokens is not None:
        workspace_tokens = check_int(workspace_tokens, "workspace_tokens", minimum=1)
    check_choice(path, "path", PATHS)
    route = route_of(batch, cache, Layer(q.shape[1], q.dtype, window, workspace_tokens, path))
    sees_nothing = batch.num_sequences == 0 or min(batch.max_q, batch.max_k) == 0
    return _Call(g, scale, window, route, sees_nothing, _likeness_of(cache))


def _likeness_of(cache: PagedKVCache) -> int:
    try:
        return cache.likeness
    except ValueError as error:  # it names a pool or a scale, which are no arguments of this call
        raise ValueError(f"cache cannot be read: {error}") from None


@torch.no_grad()
def _dense_path(
    q: Tensor, cache: PagedKVCache, batch: PrefixBatch, call: _Call, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend by dense kernels to what is gathered, at least in part; or to nothing."""
    if q.stride(2) != 1:
        q = q.contiguous()
    if call.sees_nothing:
        out, lse = _nothing(q, call.geometry.v_head_dim, sinks)
    elif call.route.common is not None:
        return _common_part_first(q, cache, batch, call.route.common, call.scale, sinks)
    else:
        assert call.route.pieces is not None
        out, lse = _gathered(q, cache, call.route.pieces, call.scale, sinks)
    refuse_rows(out, lse, batch.cu_seqlens_q, batch.max_q)
    return out, lse


def _check(q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch) -> None:
    """Raise unless the tensors, the cache and the batch belong together."""
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
        missing, given = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        raise TypeError(f"{missing} is None and {given} is not; accepted: both, or neither (already in the cache)")
    for name, tensor, dim in (("k_new", k_new, g.head_dim), ("v_new", v_new, g.v_head_dim)):
        if tensor is None:
            continue
        check_tensor(tensor, name, ndim=3, dtypes=FLOATS, device=g.device)
        if tuple(tensor.shape) != (rows, g.num_kv_heads, dim):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted for total_q {rows}: [{rows}, {g.num_kv_heads}, {dim}]"
            )


def _softmax_scale(given: object, head_dim: int) -> float:
    if given is None:
        return float(head_dim**-0.5)
    # Kernels multiply a row's largest product by it, and take that for the largest score: it is above 0.
    return check_positive(given, "softmax_scale", "None, or a number")


def _nothing(q: Tensor, dim: int, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What rows see that belong to no sequence."""
    state = RunningState(q.shape[0], q.shape[1], dim, q.dtype, q.device)
    return apply_sinks(state.out, state.lse, sinks) if sinks is not None else (state.out, state.lse)


def _gathered(
    q: Tensor, cache: PagedKVCache, pieces: Pieces, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gather each piece into the same memory, attend, merge; the sinks come once, when all is merged."""
    g = cache.geometry
    k, v = (q.new_empty((pieces.capacity, g.num_kv_heads, dim)) for dim in (g.head_dim, g.v_head_dim))
    if pieces.all_at_once(len(q)):
        (piece,) = pieces.pieces
        cache.gather(piece.plan, out_dtype=q.dtype, out=(k, v))
        out, lse = _dense(q, k, v, piece, piece.attends[0], scale)
        return apply_sinks(out, lse, sinks) if sinks is not None else (out, lse)
    state = RunningState(q.shape[0], q.shape[1], g.v_head_dim, torch.float32 if pieces.merged else q.dtype, q.device)
    for piece in pieces.pieces:
        cache.gather(piece.plan, out_dtype=q.dtype, out=(k, v))
        for attend in piece.attends:
            part = _dense(q, k, v, piece, attend, scale)
            if pieces.merged:
                state.add(attend.rows, *part)
            else:
                state.put(attend.rows, *part)
            del part  # or it would still be there beside the next one
    out, lse = state.out, state.lse
    del state, k, v
    if sinks is not None:
        out, lse = apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _dense(q: Tensor, k: Tensor, v: Tensor, piece: Piece, attend: Attend, scale: float) -> tuple[Tensor, Tensor]:
    return dense_attention(
        q[attend.rows], k[: piece.plan.total_tokens], v[: piece.plan.total_tokens],
        attend.cu_seqlens_q, attend.cu_seqlens_k, max_q=attend.max_q, max_k=attend.max_k, softmax_scale=scale,
        causal=attend.causal, window=attend.window, seqlens_q=attend.seqlens_q, seqlens_k=attend.seqlens_k,
    )  # fmt: skip


def _common_part_first(
    q: Tensor, cache: PagedKVCache, batch: PrefixBatch, common: Common, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gather what is cached in every sequence, attend with no mask, and go on from there straight from the pages."""
    piece = common.piece
    k, v = cache.gather(piece.plan, out_dtype=q.dtype)
    out, lse = _dense(q, k, v, piece, piece.attends[0], scale)
    del k, v
    state = out.contiguous(), lse.contiguous()  # the flash kernel's log-sum-exp is stored by heads
    return _direct_attention()(q, cache, batch, softmax_scale=scale, sinks=sinks, begin=common.begin, state=state)


def _direct(
    q: Tensor, cache: PagedKVCache, batch: PrefixBatch, scale: float, sinks: Tensor | None, window: int | None,
    likeness: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.stride(2) != 1:
        q = q.contiguous()
    attend = _direct_attention()
    return attend(q, cache, batch, softmax_scale=scale, sinks=sinks, window=window, likeness=likeness)


@functools.cache
def _direct_attention() -> Any:
    from .direct import direct_attention  # needs triton, which this module does not

    return direct_attention
