"""Dense attention in plain torch, in FP32: what a CPU runs, and any device for what no kernel takes."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .dense_call import Dense

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
