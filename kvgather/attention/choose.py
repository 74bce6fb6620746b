"""The rule behind `path="auto"`, and what the path that was chosen needs of the batch.

The paths do a few things whose speed was measured once. The direct path reads the codes and multiplies. The gather
path reads the codes, writes them as 16-bit numbers and reads those; its dense kernel multiplies faster, where there are
enough rows and sequences to keep the GPU busy: it does not split the keys of a sequence over processors. The hybrid
path gathers what is cached at the beginning of every sequence, which needs no mask, for the fastest dense kernel, and
takes the rest straight from the pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..batch.lengths import STEP
from ..batch.pieces import Piece, Pieces
from ..cache import PagedKVCache
from ..device import triton_available
from ..formats.checks import check_int, check_window, described, dtype_name
from ..formats.fp8 import FLOATS
from .pieces import common_piece, in_pieces

PATHS = ("auto", "direct", "gather", "hybrid")


@dataclass(frozen=True)
class Speeds:
    """How fast products are made, in TFLOP/s of rows rounded up to a kernel's tile.

    Attributes:
        direct: by the direct kernel.
        unmasked: by the dense kernel that takes what is cached in all sequences alike.
        masked: by the dense kernel that takes everything else.
    """

    direct: float
    unmasked: float
    masked: float


SPEEDS = {
    64: Speeds(direct=310, unmasked=470, masked=300),
    128: Speeds(direct=285, unmasked=750, masked=350),
    256: Speeds(direct=165, unmasked=865, masked=360),
}
"""By the larger head dim, up to 64, 128 or 256."""
READ, MOVE = 2.5e6, 2.8e6
"""Bytes per µs: of the direct path's codes, and of what the gather path reads and writes."""
LAUNCH = {"direct": 14.0, "gather": 26.0, "hybrid": 50.0}
"""µs that a path takes in addition: they differ in how many kernels they launch."""
PROCESSORS, DENSE_ROWS = 132, 128
"""Of the GPU all this was measured on; and the rows of one program of the dense kernels."""
MEASURED_ON = "one NVIDIA H100, benchmarks/results/prefix_h100.csv"


@dataclass(frozen=True)
class Facts:
    """What the rule looks at.

    Attributes:
        lengths: (new tokens, tokens) of each sequence; their averages where the host knows bounds alone.
        common: cached tokens at the beginning of every sequence that the hybrid path gathers, 0 if it has none.
        kv_heads, group: of the layer; query heads that share a KV head.
        head_dim, v_head_dim: of K and of V.
        itemsize: bytes of an element in the cache.
        dtype: of q.
        device: "cuda" or "cpu".
        triton: whether Triton is installed.
        window: of the layer, or None.
    """

    lengths: tuple[tuple[int, int], ...]
    common: int
    kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    itemsize: int
    dtype: torch.dtype
    device: str
    triton: bool
    window: int | None


def check_facts(
    cache: PagedKVCache,
    lengths: Iterable[tuple[int, int]],
    common: int,
    num_q_heads: int,
    dtype: torch.dtype,
    window: int | None,
) -> Facts:
    """The facts of a layer, its arguments checked.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache is {described(cache)}; accepted: a PagedKVCache")
    g = cache.geometry
    heads = check_int(num_q_heads, "num_q_heads", minimum=1)
    if heads % g.num_kv_heads:
        raise ValueError(f"num_q_heads is {heads}; accepted: a multiple of the cache's {g.num_kv_heads} KV heads")
    window = check_window(window)
    if dtype not in FLOATS:
        came = dtype_name(dtype) if isinstance(dtype, torch.dtype) else described(dtype)
        raise TypeError(f"dtype is {came}; accepted: {', '.join(dtype_name(d) for d in FLOATS)}")
    return Facts(
        tuple(lengths), common, g.num_kv_heads, heads // g.num_kv_heads, g.head_dim, g.v_head_dim, g.dtype.itemsize,
        dtype, g.device.type, triton_available(), window,
    )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A path, and why."""

    path: str
    why: str


def choose(facts: Facts) -> Choice:
    """The faster path, as far as it was measured."""
    if facts.device != "cuda":
        return Choice("gather", f"on a {facts.device} there is no GPU to read pages with")
    if not facts.triton:
        return Choice("gather", "Triton is not available, and the direct path is a Triton kernel")
    if facts.dtype == torch.float32:
        return Choice("gather", "q is float32, and what the direct kernel gains it gains from 16-bit products")
    speeds = _speeds(facts)
    if speeds is None:
        larger = max(facts.head_dim, facts.v_head_dim)
        return Choice("gather", f"head dim {larger} is past what was measured, {max(SPEEDS)}")
    times = expected_times(facts, speeds)
    path, *others = sorted(times, key=lambda name: times[name])
    rest = ", ".join(f"{times[other]:,.0f} µs of the {other} path" for other in others)
    return Choice(path, f"about {times[path]:,.0f} µs expected, {rest}")


def expected_times(facts: Facts, speeds: Speeds) -> dict[str, float]:
    """µs that each path should take; without "hybrid" where the sequences have no common part to gather."""
    times = {"direct": direct_time(facts, speeds), "gather": gather_time(facts, speeds)}
    if facts.common:
        times["hybrid"] = hybrid_time(facts, speeds)
    return times


def direct_time(facts: Facts, speeds: Speeds) -> float:
    """µs that the direct path should take."""
    return LAUNCH["direct"] + _read_pages(facts, speeds, facts.lengths)


def gather_time(facts: Facts, speeds: Speeds) -> float:
    """µs that the gather path should take."""
    gathered = [(new, _seen(facts, new, tokens)) for new, tokens in facts.lengths]
    return LAUNCH["gather"] + _gather_and_attend(facts, gathered, speeds.masked, causal=True)


def hybrid_time(facts: Facts, speeds: Speeds) -> float:
    """µs that the hybrid path should take: the common part gathered, the rest straight from the pages."""
    gathered = [(new, facts.common) for new, _ in facts.lengths]
    rest = [(new, tokens - facts.common) for new, tokens in facts.lengths]
    rows = sum(new for new, _ in gathered) * facts.kv_heads * facts.group
    state = 4 * rows * facts.v_head_dim / MOVE
    attended = _gather_and_attend(facts, gathered, speeds.unmasked, causal=False)
    return LAUNCH["hybrid"] + attended + _read_pages(facts, speeds, rest) + state


def _gather_and_attend(facts: Facts, lengths: list[tuple[int, int]], speed: float, causal: bool) -> float:
    """µs to gather the tokens of each (new, tokens) and to attend to them by a dense kernel of `speed` TFLOP/s.

    With a causal mask half of the products of new tokens with new tokens are left out. Without a mask the heads of a
    group are rows of one tile, if the tokens do not fill it themselves.
    """
    code_bytes = facts.kv_heads * (facts.head_dim + facts.v_head_dim)  # of one token, a byte an element
    row_flops = 2 * (facts.head_dim + facts.v_head_dim)  # of one query head and one key
    # The flash kernel, which takes the causal mask, has half as many rows in a program where dims are large.
    tile_rows = DENSE_ROWS // 2 if causal and max(facts.head_dim, facts.v_head_dim) > 128 else DENSE_ROWS
    flops, programs = 0, 0
    for new, tokens in lengths:
        folded = not causal and new < DENSE_ROWS
        heads, rows = (1, new * facts.group) if folded else (facts.group, new)
        tiles = heads * facts.kv_heads * -(-rows // tile_rows)
        flops += row_flops * tiles * tile_rows * (tokens - causal * (min(new, tokens) // 2))
        programs += tiles
    gathered = sum(tokens for _, tokens in lengths)
    busy = min(1.0, max(programs, 1) / PROCESSORS)
    gather = (facts.itemsize + 2) * gathered * code_bytes / MOVE
    return gather + max(2 * gathered * code_bytes / MOVE, flops / (speed * 1e6 * busy))


def _read_pages(facts: Facts, speeds: Speeds, lengths: Iterable[tuple[int, int]]) -> float:
    """µs of the direct kernel over sequences: it waits for codes, or for products."""
    size, flops = 0, 0
    for new, tokens in lengths:
        rows = new * facts.group
        tile = 16 if rows <= 16 else 64 if rows <= 64 or max(facts.head_dim, facts.v_head_dim) > 128 else 128
        seen = _seen(facts, tile // facts.group, tokens) - min(new, tokens) // 2 * (facts.window is None)
        size += _seen(facts, new, tokens) * facts.itemsize * (new > 0)
        flops += -(-rows // tile) * tile * seen
    dims = facts.kv_heads * (facts.head_dim + facts.v_head_dim)
    return max(size * dims / READ, 2 * flops * dims / (speeds.direct * 1e6))


def _seen(facts: Facts, new: int, tokens: int) -> int:
    """Keys that some of the last `new` tokens see."""
    return tokens if facts.window is None else min(tokens, facts.window + new)


def _speeds(facts: Facts) -> Speeds | None:
    larger = max(facts.head_dim, facts.v_head_dim)
    return next((speeds for dim, speeds in SPEEDS.items() if larger <= dim), None)


def explained(facts: Facts) -> str:
    """The choice in words, with the numbers that decided."""
    choice, speeds = choose(facts), _speeds(facts)
    new, tokens = (max((pair[i] for pair in facts.lengths), default=0) for i in range(2))
    cached = [tokens - new for new, tokens in facts.lengths]
    fewest, most = (f"{find(cached, default=0):,}" for find in (min, max))
    alike = f", of which the hybrid path gathers {facts.common:,} of each" if facts.common else ""
    lines = [
        f"auto takes the {choice.path} path: {choice.why}",
        f"  {len(facts.lengths)} sequences, at most {new:,} new tokens and {tokens:,} tokens; "
        f"{fewest if fewest == most else f'{fewest} to {most}'} cached in each{alike}; "
        f"window {'none' if facts.window is None else facts.window}",
        f"  {facts.group} query heads to each of {facts.kv_heads} KV heads, dims {facts.head_dim} and "
        f"{facts.v_head_dim}, {dtype_name(facts.dtype)}, {facts.device}",
    ]
    if speeds is None or facts.device != "cuda":  # nothing that was measured decided
        return "\n".join(lines)
    lines += [
        f"  products in TFLOP/s: direct {speeds.direct:g}, dense {speeds.unmasked:g} without a mask and "
        f"{speeds.masked:g} with one; memory in GB/s: {READ / 1e3:g} and {MOVE / 1e3:g}",
        f"  where that comes from: {MEASURED_ON}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Layer:
    """What decides about a layer's way, besides the batch and the cache; checked by the caller.

    Attributes:
        q_heads, dtype: of q.
        window: of the layer, or None.
        workspace_tokens: tokens that may be gathered at a time, or None.
        path: "auto", "direct", "gather" or "hybrid".
    """

    q_heads: int
    dtype: torch.dtype
    window: int | None
    workspace_tokens: int | None
    path: str


class Common(NamedTuple):
    """The tokens that are cached at the beginning of every sequence, gathered for a kernel without a mask.

    Attributes:
        piece: of these tokens.
        begin: `[batch]` int32: where the direct kernel goes on.
    """

    piece: Piece
    begin: Tensor


@dataclass(frozen=True)
class Route:
    """The path that a layer takes through a batch, and what it needs there.

    Attributes:
        path: "direct", "gather" or "hybrid".
        pieces: of the gather path.
        common: of the hybrid path.
    """

    path: str
    pieces: Pieces | None = None
    common: Common | None = None


def route_of(batch: CheckedBatch, cache: PagedKVCache, layer: Layer) -> Route:
    """The way of a layer, found once for all that are alike.

    Raises:
        ValueError: the workspace is too small.
        CaptureError: the batch lacks something, and a CUDA graph is being captured.
    """
    g = cache.geometry
    return batch.decided(
        (layer, g.num_kv_heads, g.head_dim, g.v_head_dim, g.dtype), lambda: _found(batch, cache, layer)
    )


def _found(batch: CheckedBatch, cache: PagedKVCache, layer: Layer) -> Route:
    path = layer.path
    if path == "auto":
        path = choose(facts_of(batch, cache, layer.q_heads, layer.dtype, layer.window, layer.workspace_tokens)).path
    if path == "gather":
        return Route("gather", pieces=in_pieces(batch, layer.window, layer.workspace_tokens))
    if path == "hybrid" and (length := common_length(batch, layer.window, layer.workspace_tokens)) > 0:
        return Route("hybrid", common=common_of(batch, length))
    return Route("direct")  # also where there is nothing for the hybrid path to gather


def common_length(batch: CheckedBatch, window: int | None, workspace_tokens: int | None) -> int:
    """How many tokens at the beginning of every sequence the hybrid path gathers for a kernel without a mask.

    They are cached in every sequence, and fit into the workspace. 0 in a window, where rows differ in what they see,
    and where the host does not know the lengths.
    """
    if window is not None or min(batch.max_q, batch.max_k) == 0:
        return 0
    length = batch.common_cached
    if workspace_tokens is not None:
        length = min(length, workspace_tokens // max(batch.num_sequences, 1) // STEP * STEP)
    return length


def common_of(batch: CheckedBatch, length: int) -> Common:
    """The first `length` tokens of every sequence, all of them cached."""

    def make() -> Common:
        begin = torch.full((batch.num_sequences,), length, dtype=torch.int32, device=batch.device)
        return Common(common_piece(batch, 0, length), begin)

    return batch.once(("common", length), make, f"the piece of {length} tokens that all sequences have cached")


def facts_of(
    batch: CheckedBatch,
    cache: PagedKVCache,
    num_q_heads: int,
    dtype: torch.dtype,
    window: int | None,
    workspace_tokens: int | None = None,
) -> Facts:
    """What the choice of a path looks at, for one layer.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if batch.seqlens_q is not None and batch.seqlens_k is not None:
        lengths = tuple(zip(batch.seqlens_q, batch.seqlens_k, strict=True))
    else:
        several = max(batch.num_sequences, 1)
        average = min(batch.max_q, -(-batch.total_q // several)), min(batch.max_k, -(-batch.total_k // several))
        lengths = (average,) * batch.num_sequences
    common = common_length(batch, window, workspace_tokens)
    return check_facts(cache, lengths, common, num_q_heads, dtype, window)
