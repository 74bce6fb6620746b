"""`kvgather bench prefix --peers`: our attention next to FlashAttention-3 and FlashInfer, on the same memory.

No row writes the new tokens: they are in the cache before. The rows of a case:

    auto, attention alone                  `prefix_attention` without `k_new` and `v_new`
    FlashAttention-3, BF16 pool            over a BF16 copy of the decoded pool: twice the bytes
    FlashAttention-3, FP8 pool and Q       over the FP8 pool, with q quantized before
    FlashInfer                             over the FP8 pool, with q in BF16
    direct kernel, Hopper kernel           ours, each by itself, where a GPU has both
    read limit, contiguous copy            for one new token, as in `kvgather bench prefix`

Every implementation is compared with the float64 reference before it is timed, on all rows of the first and of the last
sequence; its relative error is in its row. A peer that is not installed, that fails, or whose error is above
`PEER_TOLERANCE` has a row without times, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.prefix import prefix_attention
from ..attention.reference import reference_attention
from ..blocks import cu_seqlens
from ..cases.prefix import BuiltPrefix, PrefixCase, build_prefix
from ..plan import GatherPlan
from . import peer_fa3, peer_flashinfer, peer_kernels
from .peer import Attending, NotUsable, Peer
from .peer_targets import OURS, summary
from .prefix import TOLERANCE, memory_limits
from .report import Row
from .runner import Timing, captured, copies_for, row_of, run_cases
from .turns import time_in_turns

__all__ = ["cases", "measure", "run", "summary"]

PEER_TOLERANCE = 5e-2
"""Largest accepted error of a peer: q in FP8 costs FlashAttention-3 1.3 to 3.4e-2."""
MOST_COPIES = 32
"""Copies of the smallest case's inputs, 10 MB each: they exceed three times the L2 of an H100 or H200."""
REASON_CHARS = 300

Peers = Mapping[str, Peer | str]
"""Each peer by the name of its row, or the reason why it cannot be used."""
SOURCES: tuple[tuple[Sequence[str], Callable[[torch.device], dict[str, Peer]]], ...] = (
    (peer_fa3.NAMES, peer_fa3.find),
    (peer_flashinfer.NAMES, peer_flashinfer.find),
    (peer_kernels.NAMES, peer_kernels.find),
)
"""The names of rows, and the function that finds their peers."""


def cases(device: torch.device) -> tuple[PrefixCase, ...]:
    """The cases on a device: those with a target, decode, a long prefill, and many requests of about 128 rows."""
    if device.type != "cuda":
        return tuple(_of(new, 64, 2, q_heads=4, kv_heads=2, head_dim=16) for new in (1, 16))
    return tuple(_of(*shape, q_heads=64, head_dim=64) for shape in _SHAPES_64) + tuple(
        _of(*shape, q_heads=32, head_dim=128) for shape in _SHAPES_128
    )


_SHAPES_64 = (
    (1, 8192, 16), (16, 8192, 16), (128, 8192, 16), (512, 8192, 16), (1, 1024, 64), (1, 32768, 1), (2048, 8192, 1),
    (1, 131072, 1), (16, 2048, 64), (128, 2048, 64), (16, 1024, 256),
)  # fmt: skip
_SHAPES_128 = ((1, 8192, 16), (16, 8192, 16), (128, 8192, 16), (512, 8192, 16), (32, 2048, 64), (128, 2048, 64))
"""New tokens, cached tokens and sequences."""


def _of(new: int, cached: int, sequences: int, *, q_heads: int, head_dim: int, kv_heads: int = 8) -> PrefixCase:
    case = PrefixCase("peers", new=(new,) * sequences, cached=(cached,) * sequences)
    return replace(case, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)


def find_peers(device: torch.device) -> Peers:
    """The installed peers, and for the others the reason why they are not used."""
    found: dict[str, Peer | str] = {}
    for names, find in SOURCES:
        try:
            found |= find(device)
        except Exception as error:  # whatever an import of a foreign package raises
            found |= dict.fromkeys(names, _reason(error))
    return found


def ours(built: BuiltPrefix) -> Attending:
    """The prefix path without the write of the new tokens."""
    return partial(prefix_attention, built.q, None, None, built.cache, built.batch)


class Expected(NamedTuple):
    """The float64 output of some rows.

    Attributes:
        rows: indices of the rows, `[n]`.
        out: `[n, q_heads, head_dim]` float64.
        shape: the shape of an output of all rows.
    """

    rows: Tensor
    out: Tensor
    shape: torch.Size

    def error(self, actual: Tensor) -> float:
        """The relative error of an output; infinite if its shape is wrong or any of its rows is not finite."""
        if actual.shape != self.shape or not bool(actual.isfinite().all()):
            return float("inf")
        return float((actual[self.rows].double() - self.out).norm() / self.out.norm())


def expected_of(built: BuiltPrefix) -> Expected:
    """The reference's output for the first and the last sequence, from the K and V that the cache has now."""
    case, cache, batch = built.case, built.cache, built.batch
    chosen = sorted({0, len(case.new) - 1})
    new, lengths = ([each[index] for index in chosen] for each in (case.new, case.lengths))
    first = [sum(case.new[:index]) for index in chosen]
    rows = torch.cat([torch.arange(at, at + n, device=batch.device) for at, n in zip(first, new, strict=True)])
    cu_q, cu_k = cu_seqlens(new, batch.device), cu_seqlens(lengths, batch.device)
    plan = GatherPlan.build(
        batch.block_table[chosen],
        cu_k,
        page_size=case.page_size,
        num_blocks=batch.num_blocks,
        total_tokens=sum(lengths),
    )
    k, v = cache.gather(plan, out_dtype=torch.float32)
    q, group = built.q[rows], case.q_heads // case.kv_heads
    outs = [  # head by head: the scores of all heads would exceed the GPU's memory
        reference_attention(q[:, head * group : (head + 1) * group], k[:, head, None], v[:, head, None], cu_q, cu_k)[0]
        for head in range(case.kv_heads)
    ]
    return Expected(rows, torch.cat(outs, 1), built.q.shape)


def measure(case: PrefixCase, device: torch.device, *, seconds: float = 0.2, peers: Peers | None = None) -> list[Row]:
    """Compare our attention and the peers with the reference on a case, then time them in turns.

    Args:
        case: the batch; NHD layout, per-tensor scales, no window.
        device: where.
        seconds: approximate time to measure each implementation.
        peers: from `find_peers`, which None calls.

    Returns:
        A row for each implementation and each limit.

    Raises:
        ArithmeticError: our rows are not the reference's.
    """
    builts = [build_prefix(case, device, seed) for seed in range(copies_for(case.read_bytes, device, MOST_COPIES))]
    for built in builts:
        built.cache.write(built.k_new, built.v_new, built.batch.slots)
    expected = expected_of(builts[0])
    calls = {OURS: [ours(built) for built in builts]}
    errors = {OURS: expected.error(calls[OURS][0]())}
    if not errors[OURS] <= TOLERANCE:
        raise ArithmeticError(
            f"{OURS} is not the reference on {case.name}: error {errors[OURS]:.2g}, accepted {TOLERANCE}"
        )
    reasons: dict[str, str] = {}
    found = find_peers(device) if peers is None else peers
    for name, peer in found.items():
        if isinstance(peer, str):
            reasons[name] = peer
            continue
        try:
            calls[name], errors[name] = checked_calls(peer, builts, expected, device)
        except Exception as error:  # whatever foreign code raises
            reasons[name] = _reason(error)
    del expected
    timings = time_in_turns(calls, device, seconds=seconds)
    limits: dict[str, Timing] = {}
    if device.type == "cuda" and max(case.new) == 1:
        limits = memory_limits(case.cached_bytes, device, seconds)
    del builts, calls
    if device.type == "cuda":
        torch.cuda.empty_cache()

    row = partial(row_of, "peers", case.name, device=device)
    rows = [row(OURS, timing=timings[OURS], size=case.read_bytes, error=errors[OURS])]
    for name, peer in found.items():
        version, itemsize = ("", 1) if isinstance(peer, str) else (peer.version, peer.itemsize)
        if name in reasons:
            rows.append(row(name, timing=Timing(0, 0, 0, 0), peer_version=version, reason=reasons[name]))
        else:
            size = itemsize * case.read_bytes
            rows.append(row(name, timing=timings[name], size=size, error=errors[name], peer_version=version))
    return [*rows, *(row(name, timing=timing, size=case.cached_bytes) for name, timing in limits.items())]


def checked_calls(
    peer: Peer, builts: Sequence[BuiltPrefix], expected: Expected, device: torch.device
) -> tuple[list[Attending], float]:
    """A peer's calls, and the error of the first one; on a GPU that of a CUDA graph's replay.

    Raises:
        NotUsable: the error is above `PEER_TOLERANCE`.
        Exception: whatever the peer raises.
    """
    calls = [peer.prepare(built) for built in builts]
    error = expected.error(calls[0]())
    if device.type == "cuda" and error <= PEER_TOLERANCE:
        torch.cuda.synchronize(device)  # an asynchronous error is this peer's, and not the next call's
        outs: list[Tensor] = []
        with torch.cuda.stream(torch.cuda.current_stream(device)):  # a failed capture leaves its stream current
            replay = captured([lambda: outs.append(calls[0]())])
        outs[0].fill_(float("nan"))
        replay()
        error = expected.error(outs[0])
    if not error <= PEER_TOLERANCE:
        raise NotUsable(f"its error is {error:.2g}; accepted: {PEER_TOLERANCE}")
    return calls, error


def _reason(error: Exception) -> str:
    """One line about an error, with its type unless it is ours."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if isinstance(error, NotUsable) else f"{type(error).__name__}: {lines[0]}"
    return text[:REASON_CHARS]


def run(
    device: torch.device,
    *,
    only: str = "",
    seconds: float = 0.2,
    progress: Callable[[Sequence[PrefixCase]], Iterable[PrefixCase]] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """`kvgather bench prefix --peers`; the arguments are those of `run_cases`."""
    timed = partial(measure, peers=find_peers(device))
    return run_cases(cases, timed, device, only=only, seconds=seconds, progress=progress, keep=keep)
