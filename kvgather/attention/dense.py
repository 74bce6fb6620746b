"""Dense attention over rows of K and V that lie side by side, by whichever of PyTorch's kernels is the fastest.

Three backends, each for what it is best at: cuDNN where nothing is masked and all sequences are equally long, the
flash kernel for whatever else is in 16 bits, and plain torch for the rest, FP32 and machines without a GPU among it.
Measured on one NVIDIA H100 with torch 2.11; the numbers stand where they decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.checks import check_choice, check_int, check_tensor, check_window
from ..formats.fp8 import FLOATS
from .dense_call import Dense
from .dense_cudnn import cudnn_attention, why_not_cudnn
from .dense_flash import flash_attention, why_not_flash
from .dense_torch import torch_attention

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
