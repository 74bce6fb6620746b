"""Which way a layer takes through a batch, and what it needs of the batch for that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import PagedKVCache
from .checked import CheckedBatch
from .choose import Facts, check_facts, choose
from .cut_by_lengths import common_piece
from .lengths import STEP
from .pieces import Piece, Pieces
from .workspace import in_pieces


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
    """A layer's way: "gather" has pieces, "hybrid" a common part; "direct" has neither."""

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
    if path == "gather":
        return Route(pieces=in_pieces(batch, layer.window, layer.workspace_tokens))
    if path == "hybrid" and (length := common_length(batch, layer.window, layer.workspace_tokens)) > 0:
        return Route(common=common_of(batch, length))
    return Route()


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
