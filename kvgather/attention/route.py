"""Which way a layer takes through a batch, and what it needs of the batch for that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import PagedKVCache
from ..device import triton_available
from .checked import CheckedBatch
from .choose import Facts, check_facts, choose
from .cut_by_lengths import common_piece
from .pieces import Piece, Pieces
from .workspace import in_pieces


@dataclass(frozen=True)
class Layer:
    """What decides about a layer's way, besides the batch and the cache; checked by the caller.

    Attributes:
        q_heads, dtype: of q.
        window: of the layer, or None.
        workspace_tokens: tokens that may be gathered at a time, or None.
        path: "auto", "gather" or "direct".
    """

    q_heads: int
    dtype: torch.dtype
    window: int | None
    workspace_tokens: int | None
    path: str


@dataclass(frozen=True)
class Common:
    """The tokens that are cached at the beginning of every sequence, gathered for a kernel without a mask.

    Attributes:
        piece: of these tokens.
        begin: `[batch]` int32: where the direct kernel goes on.
    """

    piece: Piece
    begin: Tensor


@dataclass(frozen=True)
class Route:
    """A layer's way: the pieces that it gathers, or what is cached in all sequences and then the pages, or neither:
    straight from the pages."""

    pieces: Pieces | None = None
    common: Common | None = None

    @property
    def direct(self) -> bool:
        return self.pieces is None and self.common is None


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
    if path == "direct":
        return Route()
    if (length := _common_length(batch, layer)) > 0:
        return Route(common=common_of(batch, length))
    return Route(pieces=in_pieces(batch, layer.window, layer.workspace_tokens))


def _common_length(batch: CheckedBatch, layer: Layer) -> int:
    """How many tokens at the beginning of every sequence are cached, as far as an unmasked kernel can take them.

    0 where that pays nothing: on a CPU, in a window, in FP32, with lengths that the host does not know.
    """
    if batch.device.type != "cuda" or layer.dtype == torch.float32:
        return 0
    if layer.window is not None or layer.workspace_tokens is not None or min(batch.max_q, batch.max_k) == 0:
        return 0
    return batch.common_cached if triton_available() else 0


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

    In a bounded workspace nothing is gathered for a kernel without a mask.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if batch.seqlens_q is not None and batch.seqlens_k is not None:
        lengths = tuple(zip(batch.seqlens_q, batch.seqlens_k, strict=True))
    else:
        several = max(batch.num_sequences, 1)
        average = min(batch.max_q, -(-batch.total_q // several)), min(batch.max_k, -(-batch.total_k // several))
        lengths = (average,) * batch.num_sequences
    common = batch.common_cached if window is None and workspace_tokens is None else 0
    return check_facts(cache, lengths, common, num_q_heads, dtype, window)
