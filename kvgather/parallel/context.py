"""ContextParallel: `prefix_attention` over pages that are distributed over the ranks of a group."""

from __future__ import annotations

from typing import Any, Literal, Self, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.batch import PrefixBatch
from ..attention.prefix import partial_state, prefix_attention
from ..batch.share import Share
from ..cache import PagedKVCache
from ..formats.checks import described, resolved
from .exchange import Exchange
from .ranks import Ranks
from .states import merged


class ContextParallel:
    """Attention over a context whose pages are distributed over the ranks of a group, round robin by block.

    Every rank has all rows of q and the new tokens' K and V, writes the new tokens that belong into its pages, and
    attends to its own pages with the kernels of `prefix_attention`. One all-gather then moves each rank's output and
    log-sum-exp to all others, and every rank merges them; the sink enters once, there.

    All ranks make the same calls in the same order, with the same shapes. A call of which one rank's arguments are
    refused is a call that this rank has not made. Calls of different shapes can give wrong rows, as any collective's
    can; with the variable TORCH_DISTRIBUTED_DEBUG=DETAIL, torch compares the shapes, and every rank raises.

    Replays of a CUDA graph are not watched: if a rank is missing, they wait as long as the back end does.

    Attributes:
        share: this rank's share of every sequence's pages.
        calls: how many calls used the group.
        bytes_received: bytes of the other ranks' states that these calls brought here.
        bytes_least: what they had to bring here at least, see `states.least_bytes`.

    Example, on each of the ranks that `torchrun` started:

        with ContextParallel(dist.group.WORLD) as attend:
            batch = attend.batch(block_table, cu_seqlens_q, cu_seqlens_k, page_size=16, num_blocks=1024)
            out = attend(q, k_new, v_new, cache, batch, sinks=sinks)
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Use a group; None means the default group. To be called on all its ranks, on each equally often.

        Raises:
            ValueError: there is no group.
        """
        if not dist.is_initialized():
            raise ValueError("torch.distributed has no group; accepted: after torch.distributed.init_process_group")
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group is {described(group)}; accepted: None, or a ProcessGroup that has this process")
        self._ranks = Ranks(group, f"context/{group.group_name}")
        self.share = Share(self._ranks.rank, self._ranks.size)
        self.calls = self.bytes_received = self.bytes_least = 0

    @property
    def group(self) -> dist.ProcessGroup:
        """The group of the ranks.

        Raises:
            RuntimeError: after `close`.
        """
        return self._ranks.group

    def batch(self, block_table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **sizes: Any) -> PrefixBatch:
        """`PrefixBatch.build` with this rank's share.

        Args:
            block_table: `[batch, max_blocks]`, the same on all ranks: column c has block ids of the pool of rank
                c % ranks.
            cu_seqlens_q, cu_seqlens_k: offsets of whole sequences, the same on all ranks.
            sizes: as in `PrefixBatch.build`.

        Returns:
            A batch whose `slots` are −1 for tokens that another rank writes; `batch.writers` says which rank does.
        """
        return PrefixBatch.build(block_table, cu_seqlens_q, cu_seqlens_k, share=self.share, **sizes)

    @overload
    def __call__(
        self, q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
        softmax_scale: float | None = ..., sinks: Tensor | None = ..., window: int | None = ...,
        workspace_tokens: int | None = ..., path: str = ..., return_lse: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, q: Tensor, k_new: Tensor | None, v_new: Tensor | None, cache: PagedKVCache, batch: PrefixBatch,
        softmax_scale: float | None = ..., sinks: Tensor | None = ..., window: int | None = ...,
        workspace_tokens: int | None = ..., path: str = ..., *, return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def __call__(
        self,
        q: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        cache: PagedKVCache,
        batch: PrefixBatch,
        softmax_scale: float | None = None,
        sinks: Tensor | None = None,
        window: int | None = None,
        workspace_tokens: int | None = None,
        path: str = "auto",
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Write this rank's new tokens and attend to all cached and new tokens of all ranks.

        Args:
            batch: from `batch`, or a batch without a share, for a layer whose tokens are all in every rank's pool,
                such as one with a short window: it is attended locally, and nothing crosses the wire.
            q, k_new, v_new, cache, softmax_scale, sinks, window, workspace_tokens, path, return_lse: as in
                `prefix_attention`; `cache` is this rank's, all others are the same on all ranks.

        Returns:
            As `prefix_attention`, the same on all ranks. A rank's part is rounded to q's dtype before it is merged.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was written, launched or sent.
            RuntimeError: after `close`, unless the batch is attended locally; nothing was written, launched or sent.
            RankError: the collective failed; names the missing ranks. A rank that hangs is found when the group's
                time-out ends the collective, and a few seconds are needed to find which one. On GPUs it is found before
                that, the group's operations are aborted, and the call after it raises. Further calls need a new group.
        """
        if not isinstance(batch, PrefixBatch):
            raise TypeError(f"batch is {described(batch)}; accepted: a PrefixBatch, from ContextParallel.batch(...)")
        if batch.share is None or (self.share.ranks == 1 and batch.share == self.share):
            return prefix_attention(
                q, k_new, v_new, cache, batch, softmax_scale, sinks, window, workspace_tokens, path, return_lse
            )
        if batch.share != self.share:
            raise ValueError(f"batch has the share {batch.share}; accepted: {self.share}, that of this rank")
        group = self.group
        _check_current(batch.device)
        exchange = Exchange(self.share, batch.device)
        partial_state(q, k_new, v_new, cache, batch, softmax_scale, sinks, window, workspace_tokens, path, exchange)
        wire = exchange.wire
        if wire.received == 0:  # no rows
            out, lse = exchange.own(wire.form[:3], wire.form.dtype)
            return (out, lse) if return_lse else out
        exchange.gather(group, self._ranks)
        self.calls += 1
        self.bytes_received += wire.received
        self.bytes_least += wire.least
        logits = None if sinks is None else resolved(sinks)
        result, merged_lse = merged(exchange.buffers, wire.form, self.share.ranks, logits, want_lse=return_lse)
        if not return_lse:
            return result
        assert merged_lse is not None
        return result, merged_lse

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread that tells the other ranks that this one lives, and forget the group.

        Call it before `torch.distributed.destroy_process_group`: a group ends with the last reference to it. The other
        ranks regard this one as dead from then on, and abort a collective on a GPU that takes another half a minute.
        """
        self._ranks.close()


def _check_current(device: torch.device) -> None:
    """Refuse a GPU that is not the current one: the back end's collective, and the watch over it, are on that."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"batch is on {device}, and the current GPU is {torch.cuda.current_device()}; accepted: a batch on the GPU "
            "that torch.cuda.set_device made this rank's"
        )
