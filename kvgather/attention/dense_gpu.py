"""Dense attention by PyTorch's cuDNN and flash kernels, through private entry points.

The public entry points are not sufficient. `scaled_dot_product_attention` does not return the log-sum-exp. cuDNN's
ragged form takes 60 ms a call (H100, torch 2.11). `torch.nn.attention.varlen.varlen_attn`, which calls the same flash
kernel, has no grouped heads in torch 2.11 and another signature in 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """The arguments of `dense_attention`, checked.

    Attributes:
        q, k, v: rows.
        cu_q, cu_k: offsets of the sequences.
        max_q, max_k: upper bounds of the sequences' lengths.
        scale: factor of the scores.
        causal, window: the mask.
        lens_q, lens_k: the lengths, or None if the host does not know them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    scale: float
    causal: bool
    window: int | None
    lens_q: tuple[int, ...] | None
    lens_k: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, and query heads per KV head."""
        q_heads, kv_heads = self.q.shape[1], self.k.shape[1]
        return q_heads, kv_heads, q_heads // kv_heads

    @property
    def all_rows_used(self) -> bool:
        """Whether every row of q is known to belong to a sequence."""
        return self.lens_q is not None and sum(self.lens_q) == self.rows

    @property
    def all_rows_have_keys(self) -> bool:
        """Whether every row of q is known to see a key."""
        if self.lens_q is None or self.lens_k is None or not self.all_rows_used:
            return False
        required = ((q if self.causal else 1) if q else 0 for q in self.lens_q)
        return all(k >= minimum for k, minimum in zip(self.lens_k, required, strict=True))

    @property
    def has_no_keys(self) -> bool:
        """Whether it is known that no row sees a key, because an axis is empty."""
        return 0 in (*self.q.shape, *self.k.shape, *self.v.shape, self.max_q, self.max_k, len(self.cu_q) - 1)

    def empty(self) -> tuple[Tensor, Tensor]:
        """Return the result for rows that see no key: 0 and −inf."""
        out = self.q.new_zeros((*self.q.shape[:2], self.v.shape[2]))
        return out, torch.full(out.shape[:2], -math.inf, dtype=torch.float32, device=out.device)


def for_kernels(tensor: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy if a kernel could not load its last axis in units of 16 bytes."""
    unit = 16 // tensor.element_size()
    rows_are_aligned = all(stride % unit == 0 for stride in tensor.stride()[:-1])
    if tensor.stride(-1) == 1 and rows_are_aligned and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def why_no_gpu_kernel(call: Dense) -> str | None:
    """Return why PyTorch's 16-bit kernels do not support the call; None if they do."""
    if call.q.device.type != "cuda":
        return f"the kernel runs on a GPU, and q is on {call.q.device}"
    if torch.version.hip is not None:
        return "its private entry point is untested on AMD GPUs"
    if call.q.dtype == torch.float32:
        return "the kernel multiplies 16-bit numbers, and q is float32"
    if torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return "the kernel needs an Ampere GPU or a later one"
    return None


_PRIVATE: dict[str, tuple[str, Callable[[], bool], tuple[str, ...], tuple[str, ...]]] = {
    "cudnn": (
        "_scaled_dot_product_cudnn_attention", torch.backends.cudnn.is_available,
        ("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask",
         "scale"), (),
    ),
    "flash": (
        "_flash_attention_forward", torch.backends.cuda.is_flash_attention_available,
        ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
         "return_debug_mask"), ("scale", "window_size_left", "window_size_right"),
    ),
}  # fmt: skip
"""The private operators: name, whether PyTorch was built with it, and the arguments passed by position and by name."""


@cache
def entry_point(which: str) -> object:
    """Return a private operator of PyTorch, "cudnn" or "flash"; None if it is missing or has another signature."""
    name, available, positional, named = _PRIVATE[which]
    operator = getattr(torch.ops.aten, name, None)
    if operator is None or not available():
        return None
    names = tuple(argument.name for argument in operator.default._schema.arguments)
    remaining = names[len(positional) :]
    matches = names[: len(positional)] == positional and set(named) <= set(remaining) and (named or not remaining)
    return operator if matches else None


# Below this number of rows, which would leave most of a tile of 128 empty, the query heads of a group become rows.
# 16 sequences of 8,192 keys, 64/8 heads × 64: 16 rows 630 → 127 µs, 128 rows 611 → 626 µs.
_CUDNN_FOLDS_BELOW = 128


def why_not_cudnn(call: Dense) -> str | None:
    """Return why cuDNN does not support the call; None if it does."""
    if (why := why_no_gpu_kernel(call)) is not None:
        return why
    if call.causal:
        return "its causal mask is aligned to the top left, not to the bottom right"
    if call.lens_q is None or call.lens_k is None or len(set(call.lens_k)) != 1:
        return "it needs seqlens_q and seqlens_k, with equally many keys in every sequence"
    dims = call.q.shape[2], call.v.shape[2]
    max_dim = 256 if torch.cuda.get_device_capability(call.q.device) >= (9, 0) else 128
    if max(dims) > max_dim or dims[0] % 8 or dims[1] % 8:
        return f"its head dims are multiples of 8 up to {max_dim}, and those of q and v are {dims[0]} and {dims[1]}"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    if entry_point("cudnn") is None:
        return "this PyTorch has no _scaled_dot_product_cudnn_attention with the expected signature"
    return None


def cudnn_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """Attend by cuDNN, to a batch `[sequences, heads, rows, dim]`.

    Ragged rows of q are padded. For few rows, the query heads of a group become rows.
    """
    run = entry_point("cudnn")
    assert callable(run) and call.lens_q is not None and call.lens_k is not None
    sequences, keys = len(call.lens_k), call.lens_k[0]
    q_heads, kv_heads, group = call.heads
    v_dim = call.v.shape[2]
    padded = _padded_rows(max(call.lens_q))  # rows of each sequence
    is_padded = not call.all_rows_used or set(call.lens_q) != {padded}
    k, v = (for_kernels(t[: sequences * keys]).unflatten(0, (sequences, keys)) for t in (call.k, call.v))
    q = call.q[_rows_in_padded_batch(call, padded)] if is_padded else call.q
    q = for_kernels(q).unflatten(0, (sequences, padded))  # [sequences, rows, q_heads, dim]
    fold = group > 1 and padded < _CUDNN_FOLDS_BELOW
    if fold:
        q = q.unflatten(2, (kv_heads, group)).transpose(2, 3).flatten(1, 2)  # [sequences, rows × group, kv_heads, dim]
    out, lse = run(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, False, False, scale=call.scale
    )[:2]
    out, lse = out.transpose(1, 2), lse.view(lse.shape[:3]).transpose(1, 2)
    if fold:
        out, lse = (t.unflatten(1, (padded, group)).transpose(2, 3) for t in (out, lse))
    out = out.reshape(sequences * padded, q_heads, v_dim)
    # Adds NaN to the log-sum-exp of a row of NaN.
    lse = torch.add(lse.reshape(sequences * padded, q_heads), out[..., 0], alpha=0)
    if not is_padded:
        return out, lse
    index = _indices_in_padded_batch(call, padded)
    used = index.shape[0]
    if used == call.rows:
        return out[index], lse[index]
    all_out, all_lse = call.empty()
    all_out[:used], all_lse[:used] = out[index], lse[index]
    return all_out, all_lse


def _padded_rows(rows: int) -> int:
    """Round rows up to a power of two, or a multiple of 128: few shapes, because cuDNN plans each new one."""
    return 1 << (rows - 1).bit_length() if rows <= 128 else -(-rows // 128) * 128


# The lengths on the device may differ from the host's: the clamped indices then select wrong rows. Without the clamp,
# an index outside its tensor would end the process's GPU context.


def _rows_in_padded_batch(call: Dense, padded: int) -> Tensor:
    """Return the row of q for each row of the batch padded to `padded` rows a sequence; padding repeats other rows."""
    row = call.cu_q[:-1, None] + torch.arange(padded, dtype=torch.int32, device=call.q.device)
    return row.clamp(0, call.rows - 1).flatten()


def _indices_in_padded_batch(call: Dense, padded: int) -> Tensor:
    """Return the index in the padded batch of each row of q that belongs to a sequence."""
    assert call.lens_q is not None
    row = torch.arange(sum(call.lens_q), dtype=torch.int32, device=call.q.device)
    sequence = torch.searchsorted(call.cu_q[1:].contiguous(), row, right=True).clamp(max=len(call.lens_q) - 1)
    return sequence * padded + (row - call.cu_q[sequence]).clamp(0, padded - 1)


# As for cuDNN: 16 rows 921 → 180 µs, 128 rows 906 → 923 µs.
_FLASH_FOLDS_BELOW = 64


def why_not_flash(call: Dense) -> str | None:
    """Return why the flash kernel does not support the call; None if it does."""
    if (why := why_no_gpu_kernel(call)) is not None:
        return why
    if max(call.q.shape[2], call.v.shape[2]) > 256:
        return f"its head dims are at most 256, and those of q and v are {call.q.shape[2]} and {call.v.shape[2]}"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.enable_flash_sdp(False) was called"
    if entry_point("flash") is None:
        return "this PyTorch has no _flash_attention_forward with the expected signature"
    return None


def flash_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """Attend by the flash kernel: one launch for all sequences, plus small kernels for unused or folded rows."""
    run = entry_point("flash")
    assert callable(run)
    q_heads, kv_heads, group = call.heads
    rows, v_dim = call.rows, call.v.shape[2]
    dim = -(-max(call.q.shape[2], v_dim) // 8) * 8  # one dim for Q, K and V, a multiple of 8
    q, k, v = (for_kernels(F.pad(t, (0, dim - t.shape[2]))) if t.shape[2] < dim else for_kernels(t)
               for t in (call.q, call.k, call.v))  # fmt: skip
    cu_q, cu_k = call.cu_q, call.cu_k
    if not call.all_rows_used:
        cu_q, cu_k = _with_unused_rows(call)
    max_q = min(call.max_q, rows)
    fold = not call.causal and group > 1 and max_q < _FLASH_FOLDS_BELOW
    if fold:
        q = q.unflatten(1, (kv_heads, group)).transpose(1, 2).flatten(0, 1)  # [rows × group, kv_heads, dim]
        cu_q, max_q = cu_q * group, max_q * group
    left, right = (None, None) if call.window is None else (call.window - 1, 0)
    out, lse = run(
        q, k, v, cu_q, cu_k,
        max(max_q, 2),  # with 1 the kernel assumes one row in every sequence; it could not represent empty ones
        call.max_k, 0.0, call.causal and call.window is None, False,
        scale=call.scale, window_size_left=left, window_size_right=right,
    )[:2]  # fmt: skip
    out, lse = out[..., :v_dim], lse.t()
    if fold:
        out = out.unflatten(0, (rows, group)).transpose(1, 2)
        lse = lse.unflatten(0, (rows, group)).transpose(1, 2)
    out = out.reshape(rows, q_heads, v_dim)
    # The kernel returns +inf for a row without keys and for a row of NaN. Adding out keeps the NaN, also for a merge.
    lse = torch.add(lse.reshape(rows, q_heads), out[..., 0], alpha=0)
    if not call.all_rows_have_keys:
        lse.masked_fill_(lse == math.inf, -math.inf)
    return out, lse


def _with_unused_rows(call: Dense) -> tuple[Tensor, Tensor]:
    """Append sequences without keys to the offsets, for rows past the last one: the kernel sets these rows to 0."""
    added = -(-call.rows // call.max_q)
    steps = torch.arange(1, added + 1, dtype=torch.int32, device=call.cu_q.device) * call.max_q
    ends = (call.cu_q[-1:] + steps).clamp(max=call.rows)
    return torch.cat((call.cu_q, ends)), torch.cat((call.cu_k, call.cu_k[-1:].expand(added)))
