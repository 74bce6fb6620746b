"""Dense attention by cuDNN's kernel, for sequences of equally many keys that every row sees, through a private entry.

The public one, `scaled_dot_product_attention`, does not return the log-sum-exp. cuDNN's own ragged form takes 60 ms a
call (H100, torch 2.11) and is never used.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .dense_call import Dense, for_kernels, why_no_gpu_kernel

# Few rows leave most of a tile of 128 empty, so the query heads of a group become rows. 16 sequences of 8,192 keys,
# 64/8 heads × 64: 16 rows 630 → 127 µs, 128 rows 611 → 626 µs.
_FOLD_BELOW = 128

_ARGUMENTS = [
    "query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask", "scale",
]  # fmt: skip


@cache
def _entry_point() -> object:
    """The private operator, or None where it is not as it was."""
    found = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
    if found is None or not torch.backends.cudnn.is_available():
        return None
    return found if [argument.name for argument in found.default._schema.arguments] == _ARGUMENTS else None


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
    if _entry_point() is None:
        return "this PyTorch has no _scaled_dot_product_cudnn_attention as it is called here"
    return None


def cudnn_attention(call: Dense) -> tuple[Tensor, Tensor]:
    """A batch `[sequences, heads, rows, dim]`, ragged rows of q padded, few rows folded with their group's heads."""
    run = _entry_point()
    assert callable(run) and call.lens_q is not None and call.lens_k is not None
    sequences, keys = len(call.lens_k), call.lens_k[0]
    q_heads, kv_heads, group = call.heads
    v_dim = call.v.shape[2]
    each = _padded_rows(max(call.lens_q))
    same = call.all_rows_used and set(call.lens_q) == {each}
    k, v = (for_kernels(t[: sequences * keys]).unflatten(0, (sequences, keys)) for t in (call.k, call.v))
    q = call.q if same else call.q[_row_of_each_place(call, each)]
    q = for_kernels(q).unflatten(0, (sequences, each))  # [sequences, rows, q_heads, dim]
    fold = group > 1 and each < _FOLD_BELOW
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
