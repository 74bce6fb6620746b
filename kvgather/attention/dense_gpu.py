"""Dense attention by PyTorch's GPU kernels, cuDNN's and flash, through their private entry points.

The public ones do not serve here. `scaled_dot_product_attention` does not return the log-sum-exp; cuDNN's own ragged
form takes 60 ms a call (H100, torch 2.11). `torch.nn.attention.varlen.varlen_attn` has no grouped heads in torch 2.11,
and another signature in 2.13; it calls the same flash kernel.
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
        max_q, max_k: upper bounds of their lengths.
        scale: what scores are multiplied by.
        causal, window: the mask.
        lens_q, lens_k: the lengths, where the host knows them.
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
        """Query heads, KV heads, and query heads to a KV head."""
        q_heads, kv_heads = self.q.shape[1], self.k.shape[1]
        return q_heads, kv_heads, q_heads // kv_heads

    @property
    def all_rows_used(self) -> bool:
        """Whether every row of q is known to belong to a sequence."""
        return self.lens_q is not None and sum(self.lens_q) == self.rows

    @property
    def all_rows_see(self) -> bool:
        """Whether every row of q is known to see a key."""
        if self.lens_q is None or self.lens_k is None or not self.all_rows_used:
            return False
        least = ((q if self.causal else 1) if q else 0 for q in self.lens_q)
        return all(k >= needed for k, needed in zip(self.lens_k, least, strict=True))

    @property
    def nothing_to_see(self) -> bool:
        """Whether it is known that no row sees a key."""
        return 0 in (*self.q.shape, *self.k.shape, *self.v.shape, self.max_q, self.max_k, len(self.cu_q) - 1)

    def empty(self) -> tuple[Tensor, Tensor]:
        """What rows are that see nothing: 0 and −inf."""
        out = self.q.new_zeros((*self.q.shape[:2], self.v.shape[2]))
        return out, torch.full(out.shape[:2], -math.inf, dtype=torch.float32, device=out.device)


def for_kernels(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if a kernel could not load 16 bytes of its last axis at a time."""
    per_load = 16 // tensor.element_size()
    apart = all(stride % per_load == 0 for stride in tensor.stride()[:-1])
    return (
        tensor
        if tensor.stride(-1) == 1 and apart and tensor.data_ptr() % 16 == 0
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def why_no_gpu_kernel(call: Dense) -> str | None:
    """Why PyTorch's kernels for 16 bits cannot be asked; None if they can."""
    if call.q.device.type != "cuda":
        return f"it is a GPU's, and q is on {call.q.device}"
    if torch.version.hip is not None:
        return "its private entry points were never tried on an AMD GPU"
    if call.q.dtype == torch.float32:
        return "it multiplies 16-bit numbers, and q is float32"
    if torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return "it needs an Ampere GPU, or a later one"
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
"""The private operators: their names, whether they were built in, and the arguments that are passed here, by position
and by name."""


@cache
def entry_point(which: str) -> object:
    """A private operator of PyTorch, "cudnn" or "flash"; None where it does not take what is passed here."""
    name, available, positional, named = _PRIVATE[which]
    operator = getattr(torch.ops.aten, name, None)
    if operator is None or not available():
        return None
    names = tuple(argument.name for argument in operator.default._schema.arguments)
    others = names[len(positional) :]
    known = names[: len(positional)] == positional and set(named) <= set(others) and (named or not others)
    return operator if known else None


# Few rows leave most of a tile of 128 empty, so the query heads of a group become rows. 16 sequences of 8,192 keys,
# 64/8 heads × 64: 16 rows 630 → 127 µs, 128 rows 611 → 626 µs.
_CUDNN_FOLDS_BELOW = 128


def why_not_cudnn(call: Dense) -> str | None:
    if (why := why_no_gpu_kernel(call)) is not None:
        return why
    if call.causal:
        return "its causal mask begins at the top left, and the one wanted ends at the bottom right"
    if call.lens_q is None or call.lens_k is None or len(set(call.lens_k)) != 1:
        return "it needs equally many keys in every sequence, and seqlens_q and seqlens_k that say so"
    dims = call.q.shape[2], call.v.shape[2]
    most = 256 if torch.cuda.get_device_capability(call.q.device) >= (9, 0) else 128
    if max(dims) > most or dims[0] % 8 or dims[1] % 8:
        return f"its head dims are multiples of 8 up to {most}, and here they are {dims[0]} and {dims[1]}"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    if entry_point("cudnn") is None:
        return "this PyTorch has no _scaled_dot_product_cudnn_attention as it is called here"
    return None


def cudnn_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """A batch `[sequences, heads, rows, dim]`, ragged rows of q padded, few rows folded with their group's heads."""
    run = entry_point("cudnn")
    assert callable(run) and call.lens_q is not None and call.lens_k is not None
    sequences, keys = len(call.lens_k), call.lens_k[0]
    q_heads, kv_heads, group = call.heads
    v_dim = call.v.shape[2]
    each = _padded_rows(max(call.lens_q))
    same = call.all_rows_used and set(call.lens_q) == {each}
    k, v = (for_kernels(t[: sequences * keys]).unflatten(0, (sequences, keys)) for t in (call.k, call.v))
    q = call.q if same else call.q[_row_of_each_place(call, each)]
    q = for_kernels(q).unflatten(0, (sequences, each))  # [sequences, rows, q_heads, dim]
    fold = group > 1 and each < _CUDNN_FOLDS_BELOW
    if fold:
        q = q.unflatten(2, (kv_heads, group)).transpose(2, 3).flatten(1, 2)  # [sequences, rows × group, kv_heads, dim]
    out, lse = run(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, False, False, scale=call.scale
    )[:2]
    out, lse = out.transpose(1, 2), lse.view(lse.shape[:3]).transpose(1, 2)
    if fold:
        out, lse = (t.unflatten(1, (each, group)).transpose(2, 3) for t in (out, lse))
    out = out.reshape(sequences * each, q_heads, v_dim)
    lse = torch.add(lse.reshape(sequences * each, q_heads), out[..., 0], alpha=0)  # a row of NaN is NaN in both
    if same:
        return out, lse
    place = _place_of_each_row(call, each)
    used = place.shape[0]
    if used == call.rows:
        return out[place], lse[place]
    whole = call.empty()
    whole[0][:used], whole[1][:used] = out[place], lse[place]
    return whole


def _padded_rows(rows: int) -> int:
    """Rows of q as few different numbers, because each shape is planned anew: powers of two, or multiples of 128."""
    return 1 << (rows - 1).bit_length() if rows <= 128 else -(-rows // 128) * 128


# The device may know other lengths than the host. Indices are clamped: rows are the wrong ones then, and no index is
# outside its tensor, where PyTorch's kernels would end the process's GPU context.


def _row_of_each_place(call: Dense, each: int) -> Tensor:
    """Which row of q is at each place of a batch padded to `each` rows; places that are padding repeat some row."""
    place = call.cu_q[:-1, None] + torch.arange(each, dtype=torch.int32, device=call.q.device)
    return place.clamp(0, call.rows - 1).flatten()


def _place_of_each_row(call: Dense, each: int) -> Tensor:
    """Where each row of q that belongs to a sequence is in that batch."""
    assert call.lens_q is not None
    row = torch.arange(sum(call.lens_q), dtype=torch.int32, device=call.q.device)
    sequence = torch.searchsorted(call.cu_q[1:].contiguous(), row, right=True).clamp(max=len(call.lens_q) - 1)
    return sequence * each + (row - call.cu_q[sequence]).clamp(0, each - 1)


# As above: 16 rows 921 → 180 µs, 128 rows 906 → 923 µs.
_FLASH_FOLDS_BELOW = 64


def why_not_flash(call: Dense) -> str | None:
    if (why := why_no_gpu_kernel(call)) is not None:
        return why
    if max(call.q.shape[2], call.v.shape[2]) > 256:
        return f"its head dims end at 256, and here they are {call.q.shape[2]} and {call.v.shape[2]}"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.enable_flash_sdp(False) was called"
    if entry_point("flash") is None:
        return "this PyTorch has no _flash_attention_forward as it is called here"
    return None


def flash_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """One launch for all sequences, and small ones for what is ragged or folded."""
    run = entry_point("flash")
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
    fold = not call.causal and group > 1 and max_q < _FLASH_FOLDS_BELOW
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
