"""Dense attention over contiguous rows of K and V, by the fastest of PyTorch's kernels.

There are three backends: cuDNN for calls without a mask whose sequences have equally many keys, the flash kernel for
all other 16-bit calls, and plain torch for FP32 and for CPUs. All numbers were measured on one NVIDIA H100 with torch
2.11.
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

# cuDNN plans each new shape, which takes tens of ms. It is used for multiples of this number of keys only.
_CUDNN_KEYS = 1024
# cuDNN needs rows of q padded to the longest sequence. 128 rows took 611 µs, against 906 µs by flash, so up to half as
# many rows may be added.
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
    """Attend within each sequence, without synchronization; a CUDA graph can capture the call.

    Args:
        q: `[n_q, q_heads, dim]`, bfloat16, float16 or float32; query head h reads KV head h // (q_heads // kv_heads).
        k, v: `[n_k, kv_heads, dim]` and `[n_k, kv_heads, v_dim]` in q's dtype.
        cu_seqlens_q, cu_seqlens_k: `[batch + 1]` int32: offsets of the sequences. Rows past the last offset belong to
            no sequence and are ignored.
        max_q, max_k: upper bounds of a sequence's rows of q, and of its keys.
        softmax_scale: factor of the scores.
        causal: True: the last row of a sequence sees its last key, the row before it one key less. False: all rows of
            a sequence see all its keys.
        window: how many keys a row sees at most, its last one included; None means all. Only with `causal`.
        seqlens_q, seqlens_k: the lengths, or None if the host does not know them. They permit faster kernels.
        backend: "cudnn", "flash", "torch", or "auto", see `choose_backend`.

    Returns:
        out `[n_q, q_heads, v_dim]` in q's dtype and the natural log-sum-exp `[n_q, q_heads]` in FP32. Rows that see no
        key are 0 with log-sum-exp −inf. NaN in k reaches only the rows that see the key, because masked scores are
        replaced; NaN in v can reach all rows of the sequence, because v is multiplied by all weights, including 0.

    Raises:
        TypeError, ValueError: an argument is wrong, or the backend does not support the call; nothing is launched.
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
    if call.has_no_keys:
        return call.empty()
    run = {"cudnn": cudnn_attention, "flash": flash_attention, "torch": torch_attention}[backend]
    if torch.is_autocast_enabled(q.device.type):  # autocast would round q, K and V, on this path only
        with torch.autocast(q.device.type, enabled=False):
            return run(call)
    return run(call)


def choose_backend(call: Dense) -> str:
    """Return the name of the fastest backend that supports the call.

    16 sequences of 8,192 keys, 64 query heads over 8 KV heads × 64, in µs (one H100, torch 2.11, BF16; the rows "dense,
    no gather, cached part" and "dense, no gather" of benchmarks/results/prefix_h100.csv):

        rows of each     cuDNN, no mask    flash, causal
        16                          113              944
        128                         594              955
        512                       2,279            3,669

    FlexAttention took a time between the two, and needs a block mask for each batch.
    """
    options = possible(call)
    if "cudnn" in options and call.lens_q and call.lens_k:
        padded, rows = len(call.lens_q) * max(call.lens_q), sum(call.lens_q)
        if call.lens_k[0] % _CUDNN_KEYS == 0 and padded <= _CUDNN_PADDING * rows:
            return "cudnn"
    return "flash" if "flash" in options else "torch"


def possible(call: Dense) -> tuple[str, ...]:
    """Return the backends that support the call on this machine."""
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
                f"{name} has shape {list(tensor.shape)}; accepted: [batch + 1], the length of cu_seqlens_q, "
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


_SCORES = 1 << 24  # elements of a chunk of the score matrix: 64 MiB


def torch_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """Attend one sequence at a time; over `max_q` rows and `max_k` keys when only the device knows the lengths."""
    out, lse = call.empty()
    offsets = _host_offsets(call)
    if offsets is None:
        _attend_by_bounds(call, out, lse)
        return out, lse
    for (q_begin, q_end), (k_begin, k_end) in zip(pairwise(offsets[0]), pairwise(offsets[1]), strict=True):
        total = k_end - k_begin
        for begin, end in _chunks(q_begin, q_end, call.heads[0] * total):
            first, last = 0, total  # the range of keys that some of these rows see
            position = torch.arange(begin, end, device=out.device) - q_end + total
            if call.causal:
                last = max(0, end - q_end + total)
                first = max(0, begin - q_end + total + 1 - call.window) if call.window is not None else 0
            visible = _mask(call, position, torch.arange(first, last, device=out.device)) if call.causal else None
            keys = slice(k_begin + first, k_begin + last)
            out[begin:end], lse[begin:end] = _attend(call.q[begin:end], call.k[keys], call.v[keys], visible, call.scale)
    return out, lse


def _host_offsets(call: Dense) -> tuple[list[int], list[int]] | None:
    """Return the offsets on the host, or None if reading them would synchronize with a GPU."""
    if call.q.device.type == "cpu":
        return call.cu_q.tolist(), call.cu_k.tolist()
    if call.lens_q is None or call.lens_k is None:
        return None
    offsets: tuple[list[int], list[int]] = ([0], [0])
    for sums, lengths in zip(offsets, (call.lens_q, call.lens_k), strict=True):
        for length in lengths:
            sums.append(sums[-1] + length)
    return offsets


def _attend_by_bounds(call: Dense, out: Tensor, lse: Tensor) -> None:
    """Attend as if each sequence had `max_q` rows and `max_k` keys, and mask the rows and keys that it lacks."""
    row, key = (torch.arange(n, device=out.device) for n in (call.max_q, call.max_k))
    # An extra row at the end receives the results of rows that a sequence lacks.
    padded_out, padded_lse = (torch.cat((t, t[:1])) for t in (out, lse))
    for sequence in range(len(call.cu_q) - 1):
        q_begin, q_end = call.cu_q[sequence], call.cu_q[sequence + 1]
        k_begin, k_end = call.cu_k[sequence], call.cu_k[sequence + 1]
        total = k_end - k_begin
        exists = key < total
        k_row = torch.where(exists, k_begin + key, 0).clamp(0, call.k.shape[0] - 1)
        k, v = (torch.where(exists[:, None, None], rows[k_row], 0) for rows in (call.k, call.v))
        for begin, end in _chunks(0, call.max_q, call.heads[0] * call.max_k):
            q_row = q_begin + row[begin:end]
            position = q_row - q_end + total
            visible = ((_mask(call, position, key) if call.causal else True) & exists).expand(end - begin, -1)
            chunk_out, chunk_lse = _attend(call.q[q_row.clamp(0, call.rows - 1)], k, v, visible, call.scale)
            out_row = torch.where(q_row < q_end, q_row, call.rows).clamp(0, call.rows)
            padded_out[out_row], padded_lse[out_row] = chunk_out.to(out.dtype), chunk_lse
    out.copy_(padded_out[:-1])
    lse.copy_(padded_lse[:-1])


def _chunks(begin: int, end: int, scores_per_row: int) -> list[tuple[int, int]]:
    step = max(1, _SCORES // max(1, scores_per_row))
    return [(start, min(start + step, end)) for start in range(begin, end, step)]


def _mask(call: Dense, position: Tensor, key: Tensor) -> Tensor:
    """Whether each position sees each key, `[rows, keys]`."""
    visible = key <= position[:, None]
    if call.window is not None:
        visible &= key > position[:, None] - call.window
    return visible


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend rows of one sequence to keys; `visible` is `[rows, keys]`, or None without a mask. Results are FP32."""
    rows, kv_heads = q.shape[0], k.shape[1]
    if k.shape[0] == 0:
        return q.new_zeros((*q.shape[:2], v.shape[2])), q.new_full(q.shape[:2], -math.inf)
    grouped = (q.float() * scale).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = grouped @ k.float().permute(1, 2, 0)  # [kv_heads, group × rows, keys]
    if visible is not None:
        scores.unflatten(1, (-1, rows)).masked_fill_(~visible, -math.inf)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0)  # −inf − (−inf) is NaN
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).unflatten(1, (-1, rows))  # log 0 is −inf
    out = (weights @ v.float().transpose(0, 1)).div_(total.masked_fill(total == 0, 1)).unflatten(1, (-1, rows))
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse[..., 0].permute(2, 0, 1).flatten(1, 2)
