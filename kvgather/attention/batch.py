"""PrefixBatch: the new and cached tokens of a batch, checked once per forward.

All layers of a forward read the same block table with the same offsets, which are therefore checked here once.
Afterwards a bad id, a decreasing offset or a sequence longer than its row of the block table can produce rows of NaN,
but never an address outside the pool or the block table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.capture import capturing, check_may_create
from ..batch.checked import CheckedBatch, window_piece
from ..batch.contents import Sizes
from ..batch.lengths import check_fit, check_lengths, check_offsets, check_row, longest_of, total_of
from ..batch.reference import batch_tensors
from ..batch.share import Share, check_share
from ..cache import PagedKVCache
from ..formats.checks import check_choice, check_int, check_tensor, check_window, described
from ..gather.dispatch import check_made_for
from ..plan import PlanError
from .choose import PATHS, Layer, explained, facts_of, route_of

_INDEX_DTYPES = (torch.int32, torch.int64)
_INT32_MAX = 2**31 - 1


class PrefixBatch(CheckedBatch):
    """One batch of the prefix path: new tokens, and the cached tokens before them.

    Attributes:
        block_table: `[batch, max_blocks]` int32, contiguous; −1 for entries that must not be read.
        cu_seqlens_q, cu_seqlens_k: `[batch + 1]` int32: prefix sums of new tokens, and of cached + new tokens.
        total_q, total_k: rows of q and of gathered K; capacities if they are larger than the last offsets.
        max_q, max_k: upper bounds of a sequence's new tokens, and of its cached + new tokens.
        seqlens_q, seqlens_k: the lengths on the host, or None.
        page_size, num_blocks: of the pool that the batch was checked for.
        slots: `[total_q]` int64: the slot of each new token; −1 for rows that belong to no sequence.
        everything: all tokens as one piece, whose `plan` gathers cached + new tokens. Planned at first use.
        windows: window → the piece that gathers only the tokens that a layer with this window sees.
        built_in_capture: whether the batch was built during a CUDA graph's capture, and is valid only in that graph.
        share: which pages are in the pool, if it is that of one of several ranks; None for all. With a share,
            `block_table` has only this rank's columns, and `slots` is also −1 for tokens that another rank writes.
            Offsets, totals and lengths are those of whole sequences.
    """

    @classmethod
    def build(
        cls,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        page_size: int,
        num_blocks: int,
        total_q: int | None = None,
        total_k: int | None = None,
        max_q: int | None = None,
        max_k: int | None = None,
        seqlens_q: Sequence[int] | None = None,
        seqlens_k: Sequence[int] | None = None,
        windows: Iterable[int] = (),
        share: Share | None = None,
    ) -> PrefixBatch:
        """Check one batch and plan what its layers gather, on its device.

        Args:
            block_table: `[batch, max_blocks]` int32 or int64. Entries past a sequence's tokens are ignored.
            cu_seqlens_q: `[batch + 1]` int32 or int64: prefix sums of new tokens, starting at 0.
            cu_seqlens_k: `[batch + 1]` int32 or int64: prefix sums of cached + new tokens. A sequence's new tokens are
                its last ones.
            page_size: tokens per block.
            num_blocks: blocks of the pool; ids must be below it.
            total_q, total_k: the last offsets, or larger capacities. With totals or lengths the call does not
                synchronize and can be captured in a CUDA graph; otherwise the last offsets are read.
            max_q, max_k: upper bounds of a sequence's new tokens, and of its cached + new tokens. None means the
                longest of the lengths, or without lengths the bound that the totals and the block table give. Both
                are enforced on the device: a longer sequence has rows of NaN, and its new tokens are not written.
            seqlens_q, seqlens_k: the lengths, `batch` ints each, or None if the host does not know them. They permit
                faster kernels and smaller workspaces. Do not pass them for a CUDA graph that is replayed with other
                lengths: if the lengths on the device differ, rows may be wrong, and `check()` raises.
            windows: sliding windows to plan now. A window that is not listed is planned at first use.
            share: of the rank whose pool this is, where pages are distributed; None means all pages are in this pool.
                All ranks pass the same block table, in which column c is a block id of the pool of rank c % ranks, and
                the same offsets. `prefix_attention` then attends to this rank's keys, and with `return_lse=True` gives
                the rank's partial state: `kvgather.parallel.ContextParallel` merges those of all ranks.

        Returns:
            A batch. Bad contents do not raise here: an id outside the pool becomes −1 and its keys are NaN; all keys of
            a sequence with more tokens than its row of the block table or `max_k` are NaN; offsets that decrease or
            exceed the totals are clamped. `check()` reports them.

        Raises:
            TypeError, ValueError: an argument has the wrong type, rank, size or device, or the lengths do not match.
        """
        if not _indices_are_valid(block_table, cu_seqlens_q, cu_seqlens_k):
            _check_indices(block_table, cu_seqlens_q, cu_seqlens_k)
        batch = block_table.shape[0]
        page_size = check_int(page_size, "page_size", minimum=1)
        num_blocks = check_int(num_blocks, "num_blocks")
        seqlens_q = check_lengths(seqlens_q, "seqlens_q", batch)
        seqlens_k = check_lengths(seqlens_k, "seqlens_k", batch)
        window_list = _check_windows(windows)
        share = check_share(share)
        capacity = block_table.numel() * page_size
        total_q = total_of(total_q, "q", seqlens_q, cu_seqlens_q, capacity)
        total_k = total_of(total_k, "k", seqlens_k, cu_seqlens_k, capacity)
        row_tokens = block_table.shape[1] * page_size
        check_fit(seqlens_q, seqlens_k, row_tokens)
        bounds = _check_bounds(max_q, max_k, seqlens_q, seqlens_k, total_q, total_k, max(row_tokens, page_size))
        sizes = Sizes(page_size, num_blocks, total_q, total_k, bounds.max_q, bounds.max_tokens)
        # Other ranks' columns count as bad blocks: no slot is in them, and they are then left out.
        given = block_table if share is None else share.others_masked(block_table)
        tensors = batch_tensors(given, cu_seqlens_q, cu_seqlens_k, sizes)
        result = cls(
            block_table=tensors.table if share is None else share.own_columns(tensors.table),
            cu_seqlens_q=tensors.cu_q,
            cu_seqlens_k=tensors.cu_k,
            total_q=total_q,
            total_k=total_k,
            max_q=bounds.max_q,
            max_k=bounds.max_k,
            seqlens_q=seqlens_q,
            seqlens_k=seqlens_k,
            page_size=page_size,
            num_blocks=num_blocks,
            slots=tensors.slots,
            windows={},
            built_in_capture=capturing(block_table.device),
            share=share,
            _inputs=tensors.given,
        )
        for window in window_list if share is None else ():
            result.windows[window] = window_piece(result, window)
        return result

    def prepare(
        self,
        cache: PagedKVCache,
        num_q_heads: int,
        window: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        workspace_tokens: int | None = None,
        path: str = "auto",
    ) -> None:
        """Create a layer's plans, so that the layer can run for the first time while a CUDA graph is captured.

        Call it once for each kind of layer: layers with equal arguments share their plans. Running a layer outside of a
        capture prepares it too. Kernels are compiled when a layer first runs, so also run each kind of layer once
        before the capture.

        Args:
            cache: the layer's cache, or one of the same shape and dtype.
            num_q_heads: query heads, a multiple of the cache's KV heads.
            window, workspace_tokens, path: as in the call of `prefix_attention`.
            dtype: of q.

        Raises:
            TypeError, ValueError: an argument is wrong, or the batch was built for another cache.
            CaptureError: a CUDA graph is being captured.
        """
        check_may_create(self.device, self.built_in_capture, "the plan of a layer")
        facts_of(self, cache, num_q_heads, dtype, window)  # checks its arguments
        check_made_for(cache.geometry, "batch", self.page_size, self.num_blocks, self.device)
        if workspace_tokens is not None:
            workspace_tokens = check_int(workspace_tokens, "workspace_tokens", minimum=1)
        check_choice(path, "path", PATHS)
        route_of(self, cache, Layer(int(num_q_heads), dtype, window, workspace_tokens, path))

    def explain(
        self, cache: PagedKVCache, num_q_heads: int, window: int | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> str:
        """Explain which path `path="auto"` takes for a layer, from which numbers, and where they were measured.

        Args:
            cache: the layer's cache.
            num_q_heads: query heads, a multiple of the cache's KV heads.
            window: the layer's window; None means no window.
            dtype: of q.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        return explained(facts_of(self, cache, num_q_heads, dtype, window))

    def check(self, window: int | None = None) -> None:
        """Raise if the batch was built from a bad block table or bad offsets. Synchronizes with the device.

        Args:
            window: the window of all layers that read this block table, or None. Entries of blocks before the window
                are not checked: such blocks may have been freed.

        Raises:
            TypeError, ValueError: `window` is neither None nor an int of 1 or more.
            PlanError: gives the sequence, and the column of a bad entry.
        """
        window = check_window(window)
        table, offsets_q, offsets_k = (tensor.cpu() for tensor in self._inputs())
        lens_q = check_offsets(offsets_q, "q", self.total_q, self.seqlens_q)
        lens_k = check_offsets(offsets_k, "k", self.total_k, self.seqlens_k)
        for sequence, (new, tokens) in enumerate(zip(lens_q, lens_k, strict=True)):
            if new > tokens:
                raise PlanError(
                    f"sequence {sequence} has {new} new tokens among {tokens}; accepted: cu_seqlens_k counts both"
                )
            first = 0 if window is None else max(0, tokens - new - window + 1)
            check_row(table[sequence], sequence, first, tokens, self.page_size, self.num_blocks, self.share)
            for name, length, bound in (("max_q", new, self.max_q), ("max_k", tokens, self.max_k)):
                if length > bound:
                    raise PlanError(f"sequence {sequence} has {length} tokens; accepted: at most {name}, {bound}")


class _Bounds(NamedTuple):
    """Upper bounds of one sequence: new tokens, tokens, and tokens that its row of the block table holds as well."""

    max_q: int
    max_k: int
    max_tokens: int


def _check_bounds(
    max_q: int | None, max_k: int | None, seqlens_q: tuple[int, ...] | None, seqlens_k: tuple[int, ...] | None,
    total_q: int, total_k: int, row_tokens: int,
) -> _Bounds:  # fmt: skip
    """Return the bounds of one sequence from the arguments, the lengths, the totals and the block table.

    Args:
        max_q, max_k, seqlens_q, seqlens_k, total_q, total_k: as in `PrefixBatch.build`; lengths and totals are checked.
        row_tokens: positions of a row of the block table, at least one page: keys without a block table are NaN too.

    Raises:
        TypeError, ValueError: `max_q` or `max_k` is wrong, or below a length.
    """
    row_tokens = min(row_tokens, _INT32_MAX)
    max_new = total_q if max_k is None else min(total_q, check_int(max_k, "max_k"))  # new tokens count in max_k
    max_k = max(longest_of(max_k, "max_k", seqlens_k, min(total_k, row_tokens)), min(total_k, 1))
    max_q = longest_of(max_q, "max_q", seqlens_q, max_new)
    max_tokens = min(row_tokens, max_k)
    if total_k > max_tokens:
        # A sequence with more tokens is treated as one of `max_tokens` tokens, all in bad blocks. If it has at most
        # `max_tokens` new tokens, each of its rows sees such a key; if more, it exceeds `max_q`. All its rows are NaN.
        max_q = min(max_q, max_tokens)
    return _Bounds(max_q, max_k, max_tokens)


def _indices_are_valid(block_table: object, cu_seqlens_q: object, cu_seqlens_k: object) -> bool:
    """Whether contiguous tensors pass every check of `_check_indices`: a fast path of 3 µs instead of 15."""
    if not (type(block_table) is type(cu_seqlens_q) is type(cu_seqlens_k) is Tensor):
        return False
    tensors = (block_table, cu_seqlens_q, cu_seqlens_k)
    device = block_table.device
    if torch.compiler.is_compiling() or block_table.ndim != 2 or device.type == "meta":
        return False
    for tensor in tensors:
        if not (
            tensor.dtype in _INDEX_DTYPES
            and tensor.layout is torch.strided
            and tensor.device == device
            and tensor.is_contiguous()
            and (tensor.storage_offset() + tensor.numel()) * tensor.element_size() <= tensor.untyped_storage().nbytes()
        ):
            return False
    offsets = (block_table.shape[0] + 1,)
    return cu_seqlens_q.shape == offsets == cu_seqlens_k.shape


def _check_indices(block_table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    check_tensor(block_table, "block_table", ndim=2, dtypes=_INDEX_DTYPES)
    batch = block_table.shape[0]
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(offsets, name, ndim=1, dtypes=_INDEX_DTYPES, device=block_table.device)
        if offsets.shape[0] != batch + 1:
            raise ValueError(f"{name} has shape {list(offsets.shape)}; accepted for {batch} sequences: [{batch + 1}]")


def _check_windows(windows: object) -> list[int]:
    if isinstance(windows, (str, bytes, Tensor)) or not isinstance(windows, Iterable):
        raise TypeError(f"windows is {described(windows)}; accepted: ints, such as (128,)")
    items: list[Any] = list(windows)
    checked = []
    for i, item in enumerate(items):
        window = check_window(item, f"windows[{i}]")
        if window is None:
            raise TypeError(f"windows[{i}] is None; accepted: an int of 1 or more; layers without a window need none")
        checked.append(window)
    return checked
