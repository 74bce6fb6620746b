"""CheckedBatch: the tensors and bounds of a batch, and the plans and decisions that its layers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..plan import GatherPlan
from .capture import check_may_create
from .lengths import STEP
from .pieces import Attend, Piece
from .reference import new_positions, window_lengths, window_offsets
from .share import Share


@dataclass(frozen=True, eq=False)
class CheckedBatch:
    """A batch whose contents refer to no address outside the pool or the block table; see `PrefixBatch`."""

    block_table: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    total_q: int
    total_k: int
    max_q: int
    max_k: int
    seqlens_q: tuple[int, ...] | None
    seqlens_k: tuple[int, ...] | None
    page_size: int
    num_blocks: int
    slots: Tensor
    windows: dict[int, Piece]
    built_in_capture: bool = field(repr=False)
    share: Share | None
    _inputs: Callable[[], tuple[Tensor, Tensor, Tensor]] = field(repr=False)  # block table and offsets, unchecked
    _device_objects: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _host_decisions: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_sequences(self) -> int:
        return self.block_table.shape[0]

    @property
    def device(self) -> torch.device:
        return self.block_table.device

    @property
    def everything(self) -> Piece:
        """All tokens as one piece, planned at first use.

        Raises:
            CaptureError: this is the first use, and a CUDA graph is being captured.
        """
        return self.once("everything", self._everything, "the plan of all tokens")

    def _everything(self) -> Piece:
        if self.share is not None:
            raise ValueError("the batch has a share: its rank has no plan of all tokens, which are in several pools")
        plan = GatherPlan.of_checked(
            self.block_table, self.cu_seqlens_k, None, self.page_size, self.num_blocks, self.total_k
        )
        attend = Attend(
            slice(0, self.total_q), self.cu_seqlens_q, self.cu_seqlens_k, self.max_q, self.max_k, causal=self.max_q > 1,
            seqlens_q=self.seqlens_q, seqlens_k=self.seqlens_k,
        )  # fmt: skip
        return Piece(plan, (attend,))

    @property
    def plan(self) -> GatherPlan:
        """The plan of all tokens, cached + new."""
        return self.everything.plan

    @property
    def lens_q(self) -> Tensor:
        """New tokens of each sequence, `[batch]` int32 on the device."""
        return self.cu_seqlens_q.diff()

    @property
    def lens_k(self) -> Tensor:
        """Cached + new tokens of each sequence, `[batch]` int32 on the device."""
        return self.cu_seqlens_k.diff()

    @property
    def writers(self) -> Tensor:
        """The rank that writes each new token, `[total_q]` int64: 0 without a share; −1 in rows of no sequence."""
        if self.num_sequences == 0:
            return torch.full((self.total_q,), -1, device=self.device)
        _, position, in_use = new_positions(self.cu_seqlens_q, self.lens_k, self.total_q)
        ranks = 1 if self.share is None else self.share.ranks
        return torch.where(in_use, position // self.page_size % ranks, -1)

    def for_window(self, window: int | None) -> Piece:
        """Return what a layer gathers, as one piece: all tokens, or the last tokens that are visible in a window.

        Raises:
            CaptureError: this is the first use, and a CUDA graph is being captured.
        """
        if window is None:
            return self.everything
        if window not in self.windows:
            check_may_create(self.device, self.built_in_capture, f"the plan of window {window}")
            self.windows[window] = window_piece(self, window)
        return self.windows[window]

    def visible_lens_on_host(self, window: int | None) -> tuple[int, ...] | None:
        """Return how many tokens at the end of each sequence its new tokens see; None if the lengths are unknown."""
        if self.seqlens_q is None or self.seqlens_k is None:
            return None
        before = self.max_k if window is None else window - 1  # tokens that the first new token sees before itself
        pairs = zip(self.seqlens_q, self.seqlens_k, strict=True)
        return tuple([(k if k < q + before else q + before) if q else 0 for q, k in pairs])

    def visible_lens(self, window: int | None) -> Tensor:
        """Return how many tokens at the end of each sequence its new tokens see, `[batch]` int32 on the device."""
        return window_lengths(self.lens_q, self.lens_k, self.max_q, self.max_k + 1 if window is None else window)

    def plan_of(self, cu_k: Tensor, total: int, starts: Tensor, sequences: slice = slice(None)) -> GatherPlan:
        """Plan the gather of some sequences from the positions `starts` on."""
        table = self.block_table if sequences == slice(None) else self.block_table[sequences]
        return GatherPlan.of_checked(table, cu_k, starts, self.page_size, self.num_blocks, total)

    @property
    def common_cached(self) -> int:
        """Tokens that are cached at the beginning of every sequence with new tokens, and are in this pool, rounded down
        to a multiple of `STEP`; 0 if the host does not know the lengths."""
        if self.seqlens_q is None or self.seqlens_k is None:
            return 0
        cached = (tokens - new for new, tokens in zip(self.seqlens_q, self.seqlens_k, strict=True) if new)
        return self.held(min(cached, default=0)) // STEP * STEP

    def held(self, tokens: int) -> int:
        """How many of a sequence's first `tokens` tokens are in this pool: all of them without a share."""
        return tokens if self.share is None else self.share.held(tokens, self.page_size)

    def once(self, key: object, make: Callable[[], Any], what: str) -> Any:
        """Return the result of `make`, which creates tensors on the device and is called at the first use of a key.

        Args:
            key: identifies the object.
            make: creates it.
            what: the object's name, for errors.

        Raises:
            CaptureError: this is the first use, and a CUDA graph is being captured.
        """
        if key not in self._device_objects:
            check_may_create(self.device, self.built_in_capture, what)
            self._device_objects[key] = make()
        return self._device_objects[key]

    def recall(self, key: object) -> Any:
        """Return the result that `decided` keeps for a key, or None."""
        return self._host_decisions.get(key)

    def decided(self, key: object, decide: Callable[[], Any]) -> Any:
        """Return the result of `decide`, which is called at the first use of a key.

        `decide` runs on the host and creates no tensors, except through `once`.
        """
        result = self._host_decisions.get(key)
        if result is None:
            result = self._host_decisions[key] = decide()
        return result


def window_piece(batch: CheckedBatch, window: int) -> Piece:
    """Plan what a layer with this window gathers. The caller has checked that tensors may be created now."""
    capacity = min(batch.total_k, batch.total_q + batch.num_sequences * (window - 1))
    cu_k, starts = window_offsets(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.max_q, window, capacity)
    causal = batch.max_q > 1  # a single row sees all gathered keys
    attend = Attend(
        slice(0, batch.total_q), batch.cu_seqlens_q, cu_k, batch.max_q, min(batch.max_k, batch.max_q + window - 1),
        causal=causal, window=window if causal else None, seqlens_q=batch.seqlens_q,
        seqlens_k=batch.visible_lens_on_host(window),
    )  # fmt: skip
    return Piece(batch.plan_of(cu_k, capacity, starts), (attend,))
