"""CheckedBatch: the tensors and bounds of a batch that layers read, and what they share once one of them needed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..plan import GatherPlan
from .capture import check_may_make
from .lengths import STEP
from .pieces import Attend, Piece
from .reference import window_lengths, window_offsets


@dataclass(frozen=True, eq=False)
class CheckedBatch:
    """A batch whose contents name no address outside the pool or the table; see `PrefixBatch`."""

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
    _given: Callable[[], tuple[Tensor, Tensor, Tensor]] = field(repr=False)  # table and offsets as they came
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # on the device, for layers so far
    _decided: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # by the host alone

    @property
    def num_sequences(self) -> int:
        return self.block_table.shape[0]

    @property
    def device(self) -> torch.device:
        return self.block_table.device

    @property
    def everything(self) -> Piece:
        """All tokens as one piece, planned when a layer first needs it.

        Raises:
            CaptureError: it is not there yet, and a CUDA graph is being captured.
        """
        return self.once("everything", self._everything, "the plan of all tokens")

    def _everything(self) -> Piece:
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
        """The plan that gathers all tokens, cached + new."""
        return self.everything.plan

    @property
    def lens_q(self) -> Tensor:
        """New tokens of each sequence, `[batch]` int32 on the device."""
        return self.cu_seqlens_q.diff()

    @property
    def lens_k(self) -> Tensor:
        """Cached + new tokens of each sequence, `[batch]` int32 on the device."""
        return self.cu_seqlens_k.diff()

    def for_window(self, window: int | None) -> Piece:
        """What a layer gathers, in one piece: everything, or of each sequence the last tokens that a window reaches.

        Raises:
            CaptureError: it is not there yet, and a CUDA graph is being captured.
        """
        if window is None:
            return self.everything
        if window not in self.windows:
            check_may_make(self.device, self.built_in_capture, f"what window {window} gathers")
            self.windows[window] = self._in_window(window)
        return self.windows[window]

    def _in_window(self, window: int) -> Piece:
        capacity = min(self.total_k, self.total_q + self.num_sequences * (window - 1))
        cu_k, starts = window_offsets(self.cu_seqlens_q, self.cu_seqlens_k, self.max_q, window, capacity)
        several = self.max_q > 1  # one row sees all that is gathered
        attend = Attend(
            slice(0, self.total_q), self.cu_seqlens_q, cu_k, self.max_q, min(self.max_k, self.max_q + window - 1),
            causal=several, window=window if several else None, seqlens_q=self.seqlens_q, seqlens_k=self.known(window),
        )  # fmt: skip
        return Piece(self.plan_of(cu_k, capacity, starts), (attend,))

    def known(self, window: int | None) -> tuple[int, ...] | None:
        """How many tokens at the end of each sequence its new tokens see, where the host knows the lengths."""
        if self.seqlens_q is None or self.seqlens_k is None:
            return None
        further = self.max_k if window is None else window - 1
        pairs = zip(self.seqlens_q, self.seqlens_k, strict=True)
        return tuple([(k if k < q + further else q + further) if q else 0 for q, k in pairs])

    def seen(self, window: int | None) -> Tensor:
        """The same on the device, `[batch]` int32."""
        return window_lengths(self.lens_q, self.lens_k, self.max_q, self.max_k + 1 if window is None else window)

    def plan_of(self, cu_k: Tensor, total: int, starts: Tensor, sequences: slice = slice(None)) -> GatherPlan:
        """A plan over some sequences' positions `starts` and on."""
        table = self.block_table if sequences == slice(None) else self.block_table[sequences]
        return GatherPlan.of_checked(table, cu_k, starts, self.page_size, self.num_blocks, total)

    @property
    def common_cached(self) -> int:
        """How many tokens at the beginning of every sequence are cached, rounded down to what unmasked kernels take; 0
        where the host does not know the lengths."""
        if self.seqlens_q is None or self.seqlens_k is None:
            return 0
        cached = (tokens - new for new, tokens in zip(self.seqlens_q, self.seqlens_k, strict=True) if new)
        return min(cached, default=0) // STEP * STEP

    def once(self, key: object, make: Callable[[], Any], what: str) -> Any:
        """What `make` gives, made on the device when a layer first needs it, and kept for the others.

        Args:
            what: its name in an error.

        Raises:
            CaptureError: it is not there yet, and a CUDA graph is being captured.
        """
        if key not in self._made:
            check_may_make(self.device, self.built_in_capture, what)
            self._made[key] = make()
        return self._made[key]

    def recall(self, key: object) -> Any:
        """What was decided for a key, or None."""
        return self._decided.get(key)

    def decided(self, key: object, decide: Callable[[], Any]) -> Any:
        """What `decide` gives, kept likewise: for what only the host is needed, and what it has of the device is the
        batch's already."""
        if key not in self._decided:
            self._decided[key] = decide()
        return self._decided[key]
