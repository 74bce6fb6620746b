"""Dense attention by PyTorch's flash kernel for ragged batches, through its private entry point.

The public one, `torch.nn.attention.varlen.varlen_attn`, has no grouped heads in torch 2.11, and another signature in
2.13; it calls the same kernel.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense_call import Dense, for_kernels, why_no_gpu_kernel

# Few rows leave most of a tile of 128 empty, so the query heads of a group become rows. 16 sequences of 8,192 keys,
# 64/8 heads × 64: 16 rows 921 → 180 µs, 128 rows 906 → 923 µs.
_FOLD_BELOW = 64

_NEEDED = (
    "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    "scale", "window_size_left", "window_size_right",
)  # fmt: skip


@cache
def _entry_point() -> object:
    """The private operator, or None where it is not as it was."""
    found = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if found is None or not torch.backends.cuda.is_flash_attention_available():
        return None
    names = [argument.name for argument in found.default._schema.arguments]
    return found if names[:10] == list(_NEEDED[:10]) and set(_NEEDED) <= set(names) else None


def why_not_flash(call: Dense) -> str | None:
    if (why := why_no_gpu_kernel(call)) is not None:
        return why
    if max(call.q.shape[2], call.v.shape[2]) > 256:
        return f"its head dims end at 256, and here they are {call.q.shape[2]} and {call.v.shape[2]}"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.enable_flash_sdp(False) was called"
    if _entry_point() is None:
        return "this PyTorch has no _flash_attention_forward as it is called here"
    return None


def flash_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """One launch for all sequences, and small ones for what is ragged or folded."""
    run = _entry_point()
    assert callable(run)
    q_heads, kv_heads, group = call.heads
    rows, v_dim = call.rows, call.v.shape[2]
    dim = -(-max(call.q.shape[2], v_dim) // 8) * 8  # one dim for Q, K and V, a multiple of 8
    q, k, v = (for_kernels(F.pad(t, (0, dim - t.shape[2]))) if t.shape[2] < dim else for_kernels(t)
               for t in (call.q, call.k, call.v))  # fmt: skip
    cu_q, cu_k = call.cu_q, call.cu_k
    if not call.all_rows_used:
        cu_q, cu_k = _with_spare_rows(call)
    max_q = min(call.max_q, rows)
    fold = not call.causal and group > 1 and max_q < _FOLD_BELOW
    if fold:
        q = q.unflatten(1, (kv_heads, group)).transpose(1, 2).flatten(0, 1)  # [rows × group, kv_heads, dim]
        cu_q, max_q = cu_q * group, max_q * group
    left, right = (None, None) if call.window is None else (call.window - 1, 0)
    out, lse = run(
        q, k, v, cu_q, cu_k,
        max(max_q, 2),  # at 1 it takes all sequences to have one row, and has no place for those with none
        call.max_k, 0.0, call.causal and call.window is None, False,
        scale=call.scale, window_size_left=left, window_size_right=right,
    )[:2]  # fmt: skip
    out, lse = out[..., :v_dim], lse.t()
    if fold:
        out = out.unflatten(0, (rows, group)).transpose(1, 2)
        lse = lse.unflatten(0, (rows, group)).transpose(1, 2)
    out = out.reshape(rows, q_heads, v_dim)
    # +inf is its word for a row that saw nothing, and for one of NaN, which is to stay NaN when it is merged.
    lse = torch.add(lse.reshape(rows, q_heads), out[..., 0], alpha=0)
    if not call.all_rows_see:
        lse.masked_fill_(lse == math.inf, -math.inf)
    return out, lse


def _with_spare_rows(call: Dense) -> tuple[Tensor, Tensor]:
    """Offsets with sequences of no keys for rows past the last one: the kernel makes zeros of them."""
    more = -(-call.rows // call.max_q)
    steps = torch.arange(1, more + 1, dtype=torch.int32, device=call.cu_q.device) * call.max_q
    ends = (call.cu_q[-1:] + steps).clamp(max=call.rows)
    return torch.cat((call.cu_q, ends)), torch.cat((call.cu_k, call.cu_k[-1:].expand(more)))
