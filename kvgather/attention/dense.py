"""Dense attention over contiguous rows of K and V, by whichever of PyTorch's kernels is the fastest.

Three backends, each for what it is best at: cuDNN where nothing is masked and all sequences are equally long, the
flash kernel for everything else in 16 bits, and plain torch for the rest: FP32, and machines without a GPU.
Measured on one NVIDIA H100 with torch 2.11; the numbers are given where they decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..formats.checks import check_choice, check_int, check_tensor, check_window
from ..formats.fp8 import FLOATS
from .dense_gpu import Dense, cudnn_attention, flash_attention, why_not_cudnn, why_not_flash

BACKENDS = ("auto", "cudnn", "flash", "torch")

# cuDNN plans every new shape, for tens of ms. So it is for lengths of which there are few.
_CUDNN_KEYS = 1024
# It pads ragged rows of q to the longest. 128 rows took it 611 µs, flash 906 µs: it may do half as much again.
_CUDNN_PADDING = 1.5


@torch.no_grad()
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    seqlens_q: Sequence[int] | None = None,
    seqlens_k: Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend within each sequence; nothing waits for a GPU, and what is launched can be captured in a CUDA graph.

    Args:
        q: `[n_q, q_heads, dim]`, bfloat16, float16 or float32; query head h reads KV head h // (q_heads // kv_heads).
        k, v: `[n_k, kv_heads, dim]` and `[n_k, kv_heads, v_dim]` in q's dtype.
        cu_seqlens_q, cu_seqlens_k: `[batch + 1]` int32: offsets of each sequence's rows; rows past the last are no
            sequence's, and may hold anything.
        max_q, max_k: no sequence has more rows of q, or more keys.
        softmax_scale: what scores are multiplied by.
        causal: the last row of a sequence sees its last key, the row before one key less; else all rows see all keys.
        window: how many keys a row sees at most, the last one included; None is all. Only with `causal`.
        seqlens_q, seqlens_k: the lengths, where the host knows them. They make faster kernels possible.
        backend: "cudnn", "flash", "torch", or "auto": what `choose_backend` says.

    Returns:
        out `[n_q, q_heads, v_dim]` in q's dtype and the natural log-sum-exp `[n_q, q_heads]` in FP32. Rows that see no
        key are 0 and −inf. NaN in k reaches the rows that see that key, because masked scores are replaced; NaN in v
        may reach all rows of its sequence, because v is multiplied by all weights, 0 among them.

    Raises:
        TypeError, ValueError: an argument is wrong, or the backend does not do this; nothing was launched.
    """
    call = Dense(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, softmax_scale, causal, window,
        None if seqlens_q is None else tuple(seqlens_q), None if seqlens_k is None else tuple(seqlens_k),
    )  # fmt: skip
    _check(call)
    if check_choice(backend, "backend", BACKENDS) == "auto":
        backend = choose_backend(call)
    elif (why := _WHY_NOT[backend](call)) is not None:
        raise ValueError(f"backend is {backend!r}; accepted here: {', '.join(possible(call))}, because {why}")
    if call.nothing_to_see:
        return call.empty()
    run = {"cudnn": cudnn_attention, "flash": flash_attention, "torch": torch_attention}[backend]
    if torch.is_autocast_enabled(q.device.type):  # it would round q, K and V of this path alone to its own dtype
        with torch.autocast(q.device.type, enabled=False):
            return run(call)
    return run(call)


def choose_backend(call: Dense) -> str:
    """The name of the fastest backend that can do it.

    16 sequences of 8,192 keys, 64 query heads over 8 KV heads × 64, in µs (one H100, torch 2.11, BF16; in
    benchmarks/results/prefix_h100.csv the rows "dense, no gather, cached part" and "dense, no gather"):

        rows of each     cuDNN, no mask    flash, causal
        16                          113              944
        128                         594              955
        512                       2,279            3,669

    FlexAttention was between them, and needs a block mask for each batch.
    """
    options = possible(call)
    if "cudnn" in options and call.lens_q and call.lens_k:
        padded, rows = len(call.lens_q) * max(call.lens_q), sum(call.lens_q)
        if call.lens_k[0] % _CUDNN_KEYS == 0 and padded <= _CUDNN_PADDING * rows:
            return "cudnn"
    return "flash" if "flash" in options else "torch"


def possible(call: Dense) -> tuple[str, ...]:
    """The backends that can do it here."""
    return tuple(name for name, why_not in _WHY_NOT.items() if why_not(call) is None)


_WHY_NOT = {"cudnn": why_not_cudnn, "flash": why_not_flash, "torch": lambda call: None}


def _check(call: Dense) -> None:
    q, k, v = call.q, call.k, call.v
    check_tensor(q, "q", ndim=3, dtypes=FLOATS)
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(tensor, name, ndim=3, dtypes=(q.dtype,), device=q.device)
    heads = k.shape[1]
    if k.shape[2] != q.shape[2] or heads == 0 or q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(
            f"k has shape {list(k.shape)}; accepted for q of shape {list(q.shape)}: [rows, a divisor of {q.shape[1]} "
            f"heads, {q.shape[2]}]"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v has shape {list(v.shape)}; accepted for k of shape {list(k.shape)}: its rows and heads")
    offsets = (("cu_seqlens_q", call.cu_q, call.lens_q), ("cu_seqlens_k", call.cu_k, call.lens_k))
    for name, tensor, lengths in offsets:
        check_tensor(tensor, name, ndim=1, dtypes=(torch.int32,), device=q.device)
        if tensor.shape != call.cu_q.shape or len(tensor) == 0:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted: [batch + 1], as many as cu_seqlens_q, which has "
                f"{len(call.cu_q)}"
            )
        which = name[-1]
        if lengths is not None and len(lengths) != len(tensor) - 1:
            raise ValueError(f"seqlens_{which} has {len(lengths)} lengths; accepted: {len(tensor) - 1}")
        if lengths is not None and sum(lengths) > (q if which == "q" else k).shape[0]:
            raise ValueError(
                f"seqlens_{which} sum to {sum(lengths)}; accepted: at most the rows of {which}, "
                f"{(q if which == 'q' else k).shape[0]}"
            )
        check_int(call.max_q if which == "q" else call.max_k, f"max_{which}")
    if not math.isfinite(call.scale):
        raise ValueError(f"softmax_scale is {call.scale}; accepted: a finite number")
    if check_window(call.window) is not None:
        if not call.causal:
            raise ValueError(f"window is {call.window}, and causal False; accepted: a window with causal=True")


_SCORES = 1 << 24  # elements of the score matrix at a time: 64 MiB


def torch_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """Attend one sequence after the other; on a GPU that knows more than the host, over the bounds of its lengths."""
    out, lse = call.empty()
    known = _known_offsets(call)
    if known is None:
        _within_bounds(call, out, lse)
        return out, lse
    for (q_begin, q_end), (k_begin, k_end) in zip(pairwise(known[0]), pairwise(known[1]), strict=True):
        total = k_end - k_begin
        for begin, end in _chunks(q_begin, q_end, call.heads[0] * total):
            first, last = 0, total  # the keys that any of these rows sees
            position = torch.arange(begin, end, device=out.device) - q_end + total
            if call.causal:
                last = max(0, end - q_end + total)
                first = max(0, begin - q_end + total + 1 - call.window) if call.window is not None else 0
            seen = _seen(call, position, torch.arange(first, last, device=out.device)) if call.causal else None
            keys = slice(k_begin + first, k_begin + last)
            part = _attend(call.q[begin:end], call.k[keys], call.v[keys], seen, call.scale)
            out[begin:end], lse[begin:end] = part
    return out, lse


def _known_offsets(call: Dense) -> tuple[list[int], list[int]] | None:
    """Offsets as the host knows them, if to know them is not to wait."""
    if call.q.device.type == "cpu":
        return call.cu_q.tolist(), call.cu_k.tolist()
    if call.lens_q is None or call.lens_k is None:
        return None
    offsets: tuple[list[int], list[int]] = ([0], [0])
    for made, lengths in zip(offsets, (call.lens_q, call.lens_k), strict=True):
        for length in lengths:
            made.append(made[-1] + length)
    return offsets


def _within_bounds(call: Dense, out: Tensor, lse: Tensor) -> None:
    """Every sequence as if it had `max_q` rows and `max_k` keys; what it does not have is masked."""
    row, key = (torch.arange(n, device=out.device) for n in (call.max_q, call.max_k))
    # One more row, in which all the rows that a sequence does not have end up.
    out_more, lse_more = (torch.cat((t, t[:1])) for t in (out, lse))
    for sequence in range(len(call.cu_q) - 1):
        q_begin, q_end = call.cu_q[sequence], call.cu_q[sequence + 1]
        k_begin, k_end = call.cu_k[sequence], call.cu_k[sequence + 1]
        total = k_end - k_begin
        there = key < total
        at = torch.where(there, k_begin + key, 0).clamp(0, call.k.shape[0] - 1)
        k, v = (torch.where(there[:, None, None], rows[at], 0) for rows in (call.k, call.v))
        for begin, end in _chunks(0, call.max_q, call.heads[0] * call.max_k):
            mine = q_begin + row[begin:end]
            position = mine - q_end + total
            seen = (_seen(call, position, key) if call.causal else True) & there
            part = _attend(call.q[mine.clamp(0, call.rows - 1)], k, v, seen.expand(end - begin, -1), call.scale)
            to = torch.where(mine < q_end, mine, call.rows).clamp(0, call.rows)
            out_more[to], lse_more[to] = part[0].to(out.dtype), part[1]
    out.copy_(out_more[:-1])
    lse.copy_(lse_more[:-1])


def _chunks(begin: int, end: int, scores_of_a_row: int) -> list[tuple[int, int]]:
    step = max(1, _SCORES // max(1, scores_of_a_row))
    return [(start, min(start + step, end)) for start in range(begin, end, step)]


def _seen(call: Dense, position: Tensor, key: Tensor) -> Tensor:
    seen = key <= position[:, None]
    if call.window is not None:
        seen &= key > position[:, None] - call.window
    return seen  # [rows, keys]


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Rows of one sequence and its keys; `seen` is `[rows, keys]`, or None where all is seen. Both results in FP32."""
    rows, kv_heads = q.shape[0], k.shape[1]
    if k.shape[0] == 0:
        return q.new_zeros((*q.shape[:2], v.shape[2])), q.new_full(q.shape[:2], -math.inf)
    grouped = (q.float() * scale).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = grouped @ k.float().permute(1, 2, 0)  # [kv_heads, group × rows, keys]
    if seen is not None:
        scores.unflatten(1, (-1, rows)).masked_fill_(~seen, -math.inf)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0)  # −inf less −inf would be NaN
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).unflatten(1, (-1, rows))  # log 0 is −inf
    out = (weights @ v.float().transpose(0, 1)).div_(total.masked_fill(total == 0, 1)).unflatten(1, (-1, rows))
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse[..., 0].permute(2, 0, 1).flatten(1, 2)
