"""The rule of `path="auto"`, and the plans that the chosen path needs from a batch.

The rule estimates the time of each path from measured speeds. The direct path reads the codes and multiplies. The
gather path reads the codes, writes 16-bit numbers and reads those; its dense kernel multiplies faster, given enough
rows and sequences to keep the GPU busy, because it does not split the keys of a sequence over multiprocessors. The
hybrid path gathers the tokens that are cached at the beginning of every sequence, which need no mask, for the fastest
dense kernel, and reads the other tokens directly from the pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.checked import CheckedBatch
from ..batch.lengths import STEP
from ..batch.pieces import Piece, Pieces
from ..batch.share_pieces import pieces_of_share
from ..cache import PagedKVCache
from ..device import triton_available
from ..formats.checks import check_int, check_window, described, dtype_name
from ..formats.fp8 import FLOATS
from ..hopper.plan import chosen_form
from .pieces import common_piece, in_pieces

PATHS = ("auto", "direct", "gather", "hybrid")


@dataclass(frozen=True)
class Speeds:
    """Speeds of matrix products in TFLOP/s, with rows rounded up to a kernel's tile.

    Attributes:
        direct: of the direct kernel.
        hopper: of the Hopper kernel, which attends in its place where `Facts.hopper`; 0 where there is none.
        unmasked: of the dense kernel without a mask, for keys that are cached in all sequences.
        masked: of the dense kernel with a mask.
    """

    direct: float
    hopper: float
    unmasked: float
    masked: float


SPEEDS = {
    64: Speeds(direct=310, hopper=400, unmasked=470, masked=300),
    128: Speeds(direct=285, hopper=510, unmasked=750, masked=350),
    256: Speeds(direct=165, hopper=0, unmasked=865, masked=360),
}
"""By the larger head dim: up to 64, up to 128, up to 256. `hopper` is from benchmarks/results/peers_h100.csv."""
READ, MOVE = 2.5e6, 2.8e6
"""Bytes per µs: of codes that the direct path reads, and of bytes that the gather path reads and writes."""
LAUNCH = {"direct": 14.0, "gather": 26.0, "hybrid": 50.0}
"""Fixed cost of a path in µs; the paths launch different numbers of kernels."""
PROCESSORS, DENSE_ROWS = 132, 128
"""Multiprocessors of the measured GPU, and rows of a program of the dense kernels."""
MEASURED_ON = "one NVIDIA H100, benchmarks/results/prefix_h100.csv"


@dataclass(frozen=True)
class Facts:
    """Inputs of the rule.

    Attributes:
        lengths: (new tokens, tokens) of each sequence; averages if the host knows only bounds.
        common: cached tokens at the beginning of every sequence that the hybrid path gathers; 0 means no hybrid path.
        kv_heads, group: KV heads, and query heads per KV head.
        head_dim, v_head_dim: of K and of V.
        itemsize: bytes per element of the cache.
        dtype: of q.
        device: "cuda" or "cpu".
        triton: whether Triton is installed.
        window: of the layer, or None.
        shared: whether the pool has one rank's share of the pages, see `batch.share`.
        hopper: whether the Hopper kernel attends on the direct path.
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
    shared: bool = False
    hopper: bool = False


def check_facts(
    cache: PagedKVCache,
    lengths: Iterable[tuple[int, int]],
    common: int,
    num_q_heads: int,
    dtype: torch.dtype,
    window: int | None,
    shared: bool = False,
) -> Facts:
    """Return the facts of a layer from checked arguments.

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
        received = dtype_name(dtype) if isinstance(dtype, torch.dtype) else described(dtype)
        raise TypeError(f"dtype is {received}; accepted: {', '.join(dtype_name(d) for d in FLOATS)}")
    return Facts(
        tuple(lengths), common, g.num_kv_heads, heads // g.num_kv_heads, g.head_dim, g.v_head_dim, g.dtype.itemsize,
        dtype, g.device.type, triton_available(), window, shared,
    )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A path, and the reason for it."""

    path: str
    why: str


def choose(facts: Facts) -> Choice:
    """Return the path with the shortest expected time."""
    if facts.device != "cuda":
        return Choice("gather", f"on a {facts.device} the gather path, in plain torch, is the fastest")
    if not facts.triton:
        return Choice("gather", "Triton is not available, and the direct path is a Triton kernel")
    speeds = _speeds(facts)
    if facts.shared:  # a causal mask of a dense kernel does not fit a rank's keys, so the gather path takes many calls
        if not facts.common or facts.dtype == torch.float32 or speeds is None:
            return Choice("direct", "of a rank's share of the pages, the direct path reads all with one kernel")
    elif facts.dtype == torch.float32:
        return Choice("gather", "q is float32, and the direct kernel is faster only with 16-bit products")
    if speeds is None:
        larger = max(facts.head_dim, facts.v_head_dim)
        return Choice("gather", f"head dim {larger} is above the largest measured one, {max(SPEEDS)}")
    times = expected_times(facts, speeds)
    if facts.shared:
        del times["gather"]
    path, *others = sorted(times, key=lambda name: times[name])
    alternatives = ", ".join(f"{times[other]:,.0f} µs of the {other} path" for other in others)
    return Choice(path, f"about {times[path]:,.0f} µs expected, {alternatives}")


def expected_times(facts: Facts, speeds: Speeds) -> dict[str, float]:
    """Return the expected time of each path in µs; "hybrid" only if the sequences have a common part to gather."""
    times = {"direct": direct_time(facts, speeds), "gather": gather_time(facts, speeds)}
    if facts.common:
        times["hybrid"] = hybrid_time(facts, speeds)
    return times


def direct_time(facts: Facts, speeds: Speeds) -> float:
    """Return the expected time of the direct path in µs."""
    speed = speeds.hopper if facts.hopper else speeds.direct
    return LAUNCH["direct"] + _read_pages(facts, speed, facts.lengths)


def gather_time(facts: Facts, speeds: Speeds) -> float:
    """Return the expected time of the gather path in µs."""
    gathered = [(new, _visible(facts, new, tokens)) for new, tokens in facts.lengths]
    return LAUNCH["gather"] + _gather_and_attend(facts, gathered, speeds.masked, causal=True)


def hybrid_time(facts: Facts, speeds: Speeds) -> float:
    """Return the expected time of the hybrid path in µs: of the common part, and of the rest."""
    gathered = [(new, facts.common) for new, _ in facts.lengths]
    rest = [(new, tokens - facts.common) for new, tokens in facts.lengths]
    rows = sum(new for new, _ in gathered) * facts.kv_heads * facts.group
    state_time = 4 * rows * facts.v_head_dim / MOVE
    common_time = _gather_and_attend(facts, gathered, speeds.unmasked, causal=False)
    return LAUNCH["hybrid"] + common_time + _read_pages(facts, speeds.direct, rest) + state_time


def _gather_and_attend(facts: Facts, lengths: list[tuple[int, int]], speed: float, causal: bool) -> float:
    """Return the time in µs to gather `tokens` of each (new, tokens) and to attend at `speed` TFLOP/s.

    With a causal mask, half of the products between new tokens are skipped. Without a mask, the heads of a group become
    rows of one tile if the tokens alone do not fill it.
    """
    token_elements = facts.kv_heads * (facts.head_dim + facts.v_head_dim)  # elements of K and V of a token
    row_flops = 2 * (facts.head_dim + facts.v_head_dim)  # of one query head and one key
    # The flash kernel, which runs with a causal mask, has half as many rows in a program for large head dims.
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
    copy_time = (facts.itemsize + 2) * gathered * token_elements / MOVE
    return copy_time + max(2 * gathered * token_elements / MOVE, flops / (speed * 1e6 * busy))


def _read_pages(facts: Facts, speed: float, lengths: Iterable[tuple[int, int]]) -> float:
    """Return the time of a kernel that reads pages in µs: the longer one of reading the codes and of the products.

    Args:
        speed: of its products, in TFLOP/s.
        lengths: (new tokens, tokens) of each sequence.
    """
    dim_bytes, products = 0, 0  # bytes of one dim of all visible keys, and pairs of a tile's row and a key
    for new, tokens in lengths:
        rows = new * facts.group
        tile = 16 if rows <= 16 else 64 if rows <= 64 or max(facts.head_dim, facts.v_head_dim) > 128 else 128
        visible = _visible(facts, tile // facts.group, tokens) - min(new, tokens) // 2 * (facts.window is None)
        dim_bytes += _visible(facts, new, tokens) * facts.itemsize * (new > 0)
        products += -(-rows // tile) * tile * visible
    dims = facts.kv_heads * (facts.head_dim + facts.v_head_dim)
    return max(dim_bytes * dims / READ, 2 * products * dims / (speed * 1e6))


def _visible(facts: Facts, new: int, tokens: int) -> int:
    """Count the keys that the last `new` tokens see."""
    return tokens if facts.window is None else min(tokens, facts.window + new)


def _speeds(facts: Facts) -> Speeds | None:
    larger = max(facts.head_dim, facts.v_head_dim)
    return next((speeds for dim, speeds in SPEEDS.items() if larger <= dim), None)


def explained(facts: Facts) -> str:
    """Describe the choice and the numbers behind it."""
    choice, speeds = choose(facts), _speeds(facts)
    new, tokens = (max((pair[i] for pair in facts.lengths), default=0) for i in range(2))
    cached = [tokens - new for new, tokens in facts.lengths]
    smallest, largest = f"{min(cached, default=0):,}", f"{max(cached, default=0):,}"
    common = f", of which the hybrid path gathers {facts.common:,}" if facts.common else ""
    lines = [
        f"auto takes the {choice.path} path: {choice.why}",
        f"  {len(facts.lengths)} sequences, at most {new:,} new tokens and {tokens:,} tokens; "
        f"{smallest if smallest == largest else f'{smallest} to {largest}'} cached in each{common}; "
        f"window {'none' if facts.window is None else facts.window}",
        f"  {facts.group} query heads to each of {facts.kv_heads} KV heads, dims {facts.head_dim} and "
        f"{facts.v_head_dim}, {dtype_name(facts.dtype)}, {facts.device}",
    ]
    if speeds is None or facts.device != "cuda":  # the choice does not depend on measured speeds
        return "\n".join(lines)
    direct = f"direct on Hopper {speeds.hopper:g}" if facts.hopper else f"direct {speeds.direct:g}"
    lines += [
        f"  products in TFLOP/s: {direct}, dense {speeds.unmasked:g} without a mask and "
        f"{speeds.masked:g} with one; memory in GB/s: {READ / 1e3:g} and {MOVE / 1e3:g}",
        f"  measured on: {MEASURED_ON}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Layer:
    """Arguments that determine a layer's route, besides the batch and the cache; checked by the caller.

    Attributes:
        q_heads, dtype: of q.
        window: of the layer, or None.
        workspace_tokens: upper bound of the tokens of one gather, or None.
        path: "auto", "direct", "gather" or "hybrid".
    """

    q_heads: int
    dtype: torch.dtype
    window: int | None
    workspace_tokens: int | None
    path: str


class Common(NamedTuple):
    """The part that is cached at the beginning of every sequence, for a dense kernel without a mask.

    Attributes:
        piece: the part's tokens.
        begin: `[batch]` int32: the position from which the direct kernel reads.
    """

    piece: Piece
    begin: Tensor


@dataclass(frozen=True)
class Route:
    """The path of a layer, with its plans.

    Attributes:
        path: "direct", "gather" or "hybrid".
        pieces: for the gather path; None for the others.
        common: for the hybrid path; None for the others.
    """

    path: str
    pieces: Pieces | None = None
    common: Common | None = None


def route_of(batch: CheckedBatch, cache: PagedKVCache, layer: Layer) -> Route:
    """Return the route of a layer, which is built once for layers with equal arguments.

    Raises:
        ValueError: the workspace is too small.
        CaptureError: a plan is missing, and a CUDA graph is being captured.
    """
    g = cache.geometry
    key = (layer, g.num_kv_heads, g.head_dim, g.v_head_dim, g.dtype)
    return batch.decided(key, lambda: _build_route(batch, cache, layer))


def _build_route(batch: CheckedBatch, cache: PagedKVCache, layer: Layer) -> Route:
    path = layer.path
    if path == "auto":
        path = choose(facts_of(batch, cache, layer.q_heads, layer.dtype, layer.window, layer.workspace_tokens)).path
    if path == "gather":
        cut = in_pieces if batch.share is None else pieces_of_share
        return Route("gather", pieces=cut(batch, layer.window, layer.workspace_tokens))
    if path == "hybrid" and (length := common_length(batch, layer.window, layer.workspace_tokens)) > 0:
        return Route("hybrid", common=common_of(batch, length))
    return Route("direct")  # also for a hybrid path without a common part


def common_length(batch: CheckedBatch, window: int | None, workspace_tokens: int | None) -> int:
    """Return how many tokens at the beginning of every sequence the hybrid path gathers.

    All sequences have them cached, and they fit into the workspace. 0 for a window, in which rows see different keys,
    and if the host does not know the lengths.
    """
    if window is not None or min(batch.max_q, batch.max_k) == 0:
        return 0
    length = batch.common_cached
    if workspace_tokens is not None:
        length = min(length, workspace_tokens // max(batch.num_sequences, 1) // STEP * STEP)
    return length


def common_of(batch: CheckedBatch, length: int) -> Common:
    """Return the piece of the first `length` tokens of every sequence; all of them are cached."""

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
    """Return the facts of a layer of a batch.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if batch.seqlens_q is not None and batch.seqlens_k is not None:
        pairs = zip(batch.seqlens_q, batch.seqlens_k, strict=True)
        lengths = tuple([(new, batch.held(tokens)) for new, tokens in pairs])
    else:
        batch_size = max(batch.num_sequences, 1)
        new = min(batch.max_q, -(-batch.total_q // batch_size))
        tokens = min(batch.max_k, -(-batch.total_k // batch_size))
        lengths = ((new, batch.held(tokens)),) * batch.num_sequences
    common = common_length(batch, window, workspace_tokens)
    facts = check_facts(cache, lengths, common, num_q_heads, dtype, window, batch.share is not None)
    form = chosen_form(cache, batch, batch.total_q, num_q_heads, dtype, window, cache.likeness)
    return replace(facts, hopper=form is not None)
