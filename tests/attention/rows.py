"""Rows of Q, K and V for the dense attention, what it is to make of them, and stand-ins for the GPU's kernels."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgather.attention import dense_gpu
from kvgather.attention.dense_gpu import Dense
from kvgather.attention.reference import reference_attention
from kvgather.cases import HEADS
from tests.attention.batches import error as relative_error

MIXES: dict[str, tuple[list[int], list[int]]] = {  # rows of q, keys
    "ragged": ([9, 1, 4, 2], [9, 34, 7, 140]),
    "nothing cached": ([5, 3], [5, 3]),
    "decode": ([1, 1, 1], [1, 6, 139]),
    "empty": ([3, 0, 2, 0, 1], [7, 4, 2, 0, 1]),
    "no keys": ([2, 3], [0, 5]),
    "fewer keys than rows": ([4, 3, 2], [1, 2, 6]),
    "all alike": ([16, 16], [24, 24]),
    "as many keys, ragged rows": ([3, 0, 17], [24, 24, 24]),
}


def offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def made(
    lens_q: list[int],
    lens_k: list[int],
    heads: str = "4/2x16",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spare: int = 0,
    lengths: bool = True,
) -> dict[str, Any]:
    """Arguments; with `spare` rows of NaN past the sequences, and bounds that are above what is needed."""
    q_heads, kv_heads, dim, v_dim = HEADS[heads]
    rows = ((sum(lens_q), q_heads, dim), (sum(lens_k), kv_heads, dim), (sum(lens_k), kv_heads, v_dim))
    q, k, v = (
        torch.cat((torch.randn(shape), torch.full((spare, *shape[1:]), torch.nan))).to(device, dtype) for shape in rows
    )
    known = {"seqlens_q": lens_q, "seqlens_k": lens_k} if lengths else {}
    return {
        "q": q, "k": k, "v": v, "cu_seqlens_q": offsets(lens_q, device), "cu_seqlens_k": offsets(lens_k, device),
        "max_q": max(lens_q, default=0) + spare, "max_k": max(lens_k, default=0) + spare, "softmax_scale": 0.2, **known,
    }  # fmt: skip


def wanted(
    call: dict[str, Any], lens_q: list[int], lens_k: list[int], causal: bool = True, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The reference; without a mask, which it does not have, the formula."""
    q, k, v = (call[name][:n] for name, n in (("q", sum(lens_q)), ("k", sum(lens_k)), ("v", sum(lens_k))))
    if causal:
        cu = (offsets(lens, str(q.device)) for lens in (lens_q, lens_k))
        return reference_attention(q, k, v, *cu, softmax_scale=0.2, window=window)
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    outs, lses = [], []
    for rows, keys, values in zip(q.double().split(lens_q), k.split(lens_k), v.split(lens_k), strict=True):
        scores = torch.einsum("ihd,jhd->ihj", rows, keys) * 0.2
        outs.append(torch.einsum("ihj,jhd->ihd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses)


def assert_right(got: tuple[Tensor, Tensor], call: dict[str, Any], expected: tuple[Tensor, Tensor]) -> None:
    out, lse = got
    used, exact = len(expected[0]), out.dtype == torch.float32
    assert out.dtype == call["q"].dtype and lse.dtype == torch.float32
    assert out.shape == (*call["q"].shape[:2], call["v"].shape[2]) and lse.shape == out.shape[:2]
    assert relative_error(out[:used], expected[0]) <= (1e-5 if exact else 1e-2)
    torch.testing.assert_close(lse[:used].double(), expected[1], rtol=1e-5, atol=1e-5 if exact else 1e-3)
    assert out[used:].eq(0).all() and lse[used:].eq(-math.inf).all(), "rows that belong to no sequence"
    blind = expected[1] == -math.inf
    assert out[:used][blind].eq(0).all()


def bound(call: dict[str, Any], causal: bool = True, window: int | None = None) -> Dense:
    known = [call.get(name) and tuple(call[name]) for name in ("seqlens_q", "seqlens_k")]
    tensors = [call[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    return Dense(*tensors, call["max_q"], call["max_k"], call["softmax_scale"], causal, window, *known)


# Stand-ins for the GPU's kernels.


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool, *, scale: float, window_size_left: int | None, window_size_right: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the flash kernel is: one dim, a multiple of 8; rows of no sequence are garbage; +inf for a row of nothing."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert all(t.stride(-1) == 1 for t in (q, k, v)) and dropout == 0.0 and not debug
    assert max_q > 1, "at 1 it has a way of its own, for one row in each sequence"
    assert causal or (window_size_left is None) == (window_size_right is None)
    out, lse = torch.full_like(q, 7.0), torch.full((q.shape[1], q.shape[0]), 7.0)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k) and int(cu_q[-1]) <= len(q)
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        lens = [int(cu_q[b + 1] - cu_q[b])], [int(cu_k[b + 1] - cu_k[b])]
        assert lens[0][0] <= max_q and lens[1][0] <= max_k
        if lens[0][0] == 0:
            continue
        masked = causal or window_size_left is not None
        one = {"q": q[rows], "k": k[keys], "v": v[keys]}
        window = None if window_size_left is None else window_size_left + 1
        part, part_lse = wanted_at(one, *lens, masked, window, scale)
        out[rows], lse[:, rows] = part.to(q.dtype), part_lse.float().t()
    return out, lse.masked_fill(lse.isinf() | lse.isnan(), math.inf)


def short_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *more: Any, **given: Any
) -> tuple[Tensor, Tensor]:
    """The same for sequences that may have more rows, or more keys, than the bounds: such rows are garbage past
    `max_q`. The real kernel goes by the offsets, and by `max_q` alone for how many programs it launches."""
    out, lse = flash(q, k, v, cu_q, cu_k, len(q) + 2, len(k), *more, **given)
    for first, end in pairwise(cu_q.tolist()):
        out[first + max_q : end], lse[:, first + max_q : end] = 7.0, 7.0
    return out, lse


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: None, compute_log_sumexp: bool, dropout: float, causal: bool, debug: bool,
    *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As cuDNN's kernel is: `[batch, heads, rows, dim]` of strided tensors, grouped heads, no padding."""
    assert bias is None and compute_log_sumexp and dropout == 0.0 and not causal and not debug
    assert q.shape[0] == k.shape[0] == v.shape[0] and all(t.stride(-1) == 1 for t in (q, k, v))
    rows = q.shape[2]
    parts = [
        wanted_at(
            {"q": q[b].transpose(0, 1), "k": k[b].transpose(0, 1), "v": v[b].transpose(0, 1)}, [rows], [k.shape[2]],
            False, None, scale,
        )
        for b in range(q.shape[0])
    ]  # fmt: skip
    out = torch.stack([part[0] for part in parts]).to(q.dtype)
    return out.transpose(1, 2), torch.stack([part[1] for part in parts]).float().transpose(1, 2)[..., None]


def wanted_at(
    one: dict[str, Tensor], lens_q: list[int], lens_k: list[int], causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`wanted`, at another scale."""
    return wanted({**one, "q": one["q"].double() * (scale / 0.2)}, lens_q, lens_k, causal, window)


def stand_in(monkeypatch: pytest.MonkeyPatch, **operators: Any) -> None:
    """Let dense attention run these, "flash" and "cudnn", on a CPU; one that is not given is missing."""
    monkeypatch.setattr(dense_gpu, "entry_point", operators.get)
    monkeypatch.setattr(dense_gpu, "why_no_gpu_kernel", lambda call: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
