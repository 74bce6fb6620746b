"""The rule behind `path="auto"`: numbers that are known without a wait, and constants that were measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cache import PagedKVCache
from ..device import triton_available
from ..formats.checks import check_int, described, dtype_name
from ..formats.fp8 import FLOATS

PATHS = ("auto", "gather", "direct")

MOST_ROWS = {
    64: {"all keys": 128, "a window": 128},
    128: {"all keys": 128, "a window": 128},
    256: {"all keys": 128, "a window": 128},
}
"""Up to so many rows (new tokens × query heads of a group) the direct path is the faster one, by the larger head dim,
up to 64, 128 or 256, and by whether a layer sees all keys or a window. The direct path's work grows with its rows; what
a gather adds does not, and dense kernels get more out of the same products."""

MEASURED_ON = "a first guess, not measured yet"


@dataclass(frozen=True)
class Facts:
    """What the rule looks at.

    Attributes:
        new, keys: the most new tokens, and the most tokens, of one sequence.
        group: query heads that share a KV head.
        head_dim, v_head_dim: of K and of V.
        dtype: of q.
        device: "cuda" or "cpu".
        triton: whether Triton is installed.
        window: of the layer, or None.
    """

    new: int
    keys: int
    group: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: str
    triton: bool
    window: int | None


def check_facts(
    cache: PagedKVCache, new: int, keys: int, num_q_heads: int, dtype: torch.dtype, window: int | None
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
    if window is not None:
        window = check_int(window, "window", minimum=1)
    if dtype not in FLOATS:
        came = dtype_name(dtype) if isinstance(dtype, torch.dtype) else described(dtype)
        raise TypeError(f"dtype is {came}; accepted: {', '.join(dtype_name(d) for d in FLOATS)}")
    return Facts(
        new, keys, heads // g.num_kv_heads, g.head_dim, g.v_head_dim, dtype, g.device.type, triton_available(), window
    )


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
    rows, most = facts.new * facts.group, most_rows(facts)
    if rows <= most:
        return Choice("direct", f"{facts.new} new × {facts.group} = {rows} rows ≤ {most}")
    return Choice("gather", f"{facts.new} new × {facts.group} = {rows} rows > {most}")


def most_rows(facts: Facts) -> int:
    """The entry of `MOST_ROWS`; 0 for dims past the table."""
    larger = max(facts.head_dim, facts.v_head_dim)
    column = "all keys" if facts.window is None else "a window"
    return next((row[column] for dim, row in MOST_ROWS.items() if larger <= dim), 0)


def explained(facts: Facts) -> str:
    """The choice in words, with the numbers that decided."""
    choice = choose(facts)
    window = "none" if facts.window is None else str(facts.window)
    return "\n".join(
        (
            f"auto takes the {choice.path} path: {choice.why}",
            f"  at most {facts.new} new tokens and {facts.keys} tokens a sequence; window {window}",
            f"  {facts.group} query heads to a KV head, dims {facts.head_dim} and {facts.v_head_dim}, "
            f"{dtype_name(facts.dtype)}, {facts.device}",
            f"  the rule for these dims and this window: direct up to {most_rows(facts)} rows on a GPU, else gather",
            f"  where that comes from: {MEASURED_ON}",
        )
    )
