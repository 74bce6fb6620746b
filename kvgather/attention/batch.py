"""PrefixBatch: which new tokens and which cached ones attend to each other, checked once per forward.

Every layer of a forward reads the same block table at the same offsets. So everything that can be wrong with them is
dealt with here, once: afterwards a bad id, a falling offset or a sequence longer than its row of the table can make
rows of NaN, and never an address outside the pool or the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.capture import capturing, check_may_make
from ..batch.checked import CheckedBatch
from ..batch.contents import Sizes
from ..batch.lengths import check_fit, check_lengths, check_offsets, check_row, longest_of, total_of
from ..batch.reference import batch_tensors
from ..cache import PagedKVCache
from ..formats.checks import check_choice, check_int, check_tensor, check_window, described
from ..gather.dispatch import check_made_for
from ..plan import PlanError
from .choose import PATHS, Layer, explained, facts_of, route_of

_INDEX_DTYPES = (torch.int32, torch.int64)
_MOST = 2**31 - 1


class PrefixBatch(CheckedBatch):
    """One batch of the prefix path: its new tokens, and the cached ones before them.

    Attributes:
        block_table: `[batch, max_blocks]` int32, contiguous; −1 wherever there is no block of the pool to read.
        cu_seqlens_q, cu_seqlens_k: `[batch + 1]` int32: prefix sums of new tokens, and of cached + new ones.
        total_q, total_k: rows of q and of gathered K; capacities if they are larger than the last offsets.
        max_q, max_k: no sequence has more new tokens, or more tokens.
        seqlens_q, seqlens_k: the lengths as the host knows them, or None.
        page_size, num_blocks: of the pool the batch was checked for.
        slots: `[total_q]` int64: where each new token is written; −1 for rows that belong to no sequence.
        everything: all tokens as one piece; its `plan` gathers cached + new. Planned when a layer first needs it.
        windows: window → the piece that gathers no more than a layer of that window sees.
        built_in_capture: whether a CUDA graph was being captured: then the batch is of use in that capture alone.
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
    ) -> PrefixBatch:
        """Check one batch and plan what its layers gather, on its device.

        Args:
            block_table: `[batch, max_blocks]` int32 or int64. Entries past a sequence's tokens may hold anything.
            cu_seqlens_q: `[batch + 1]` int32 or int64: prefix sums of new tokens, starting at 0.
            cu_seqlens_k: `[batch + 1]` int32 or int64: prefix sums of cached + new tokens. A sequence's new tokens are
                its last ones.
            page_size: tokens per block.
            num_blocks: blocks of the pool; ids must be below it.
            total_q, total_k: the last offsets, or more: capacities. When they or the lengths are given, nothing waits
                for the device, and the call can be captured in a CUDA graph; when None, they are read.
            max_q, max_k: upper bounds of new tokens, and of tokens, of one sequence. None: the longest of the lengths
                if those are given, else what the totals and the table allow. Both are enforced on the device: a
                sequence past one of them comes out NaN, and nothing is written for it.
            seqlens_q, seqlens_k: the lengths, where the host knows them: `batch` ints each. They choose better
                kernels and tighter workspaces. A CUDA graph that replays with other lengths must not be given them:
                where the device has others, rows may be wrong ones, and `check()` reports it.
            windows: the sliding windows of the layers to come; others work too, and are planned when first asked for.

        Returns:
            A batch. Bad contents do not raise here: an id outside the pool becomes −1 and its keys come out NaN, and so
            do all of a sequence with more tokens than its row of the table or `max_k`; offsets that fall or pass the
            totals are clamped. `check()` reports them.

        Raises:
            TypeError, ValueError: an argument has the wrong type, rank, size or device, or the lengths do not fit.
        """
        if not _certainly_good(block_table, cu_seqlens_q, cu_seqlens_k):
            _check_indices(block_table, cu_seqlens_q, cu_seqlens_k)
        batch, columns = block_table.shape
        page_size = check_int(page_size, "page_size", minimum=1)
        num_blocks = check_int(num_blocks, "num_blocks")
        known_q = check_lengths(seqlens_q, "seqlens_q", batch)
        known_k = check_lengths(seqlens_k, "seqlens_k", batch)
        asked = [_one_window(w, f"windows[{i}]") for i, w in enumerate(_listed(windows))]
        total_q = total_of(total_q, "q", known_q, cu_seqlens_q, batch * columns * page_size)
        total_k = total_of(total_k, "k", known_k, cu_seqlens_k, batch * columns * page_size)
        check_fit(known_q, known_k, columns * page_size)
        # A row of at least one column: where there is no table, keys are NaN too.
        room = min(max(columns, 1) * page_size, _MOST)
        most_new = total_q if max_k is None else min(total_q, check_int(max_k, "max_k"))  # they are among the tokens
        max_k = max(longest_of(max_k, "max_k", known_k, min(total_k, room)), min(total_k, 1))
        max_q = longest_of(max_q, "max_q", known_q, most_new)
        most = min(room, max_k)
        if total_k > most:
            # A sequence with more tokens counts as one of `most`, all in bad blocks. With up to `most` new tokens each
            # of its rows sees such a key; with more it is past `max_q`. Either way all its rows are NaN.
            max_q = min(max_q, most)

        tensors = batch_tensors(
            block_table, cu_seqlens_q, cu_seqlens_k, Sizes(page_size, num_blocks, total_q, total_k, max_q, most)
        )
        made = cls(
            block_table=tensors.table,
            cu_seqlens_q=tensors.cu_q,
            cu_seqlens_k=tensors.cu_k,
            total_q=total_q,
            total_k=total_k,
            max_q=max_q,
            max_k=max_k,
            seqlens_q=known_q,
            seqlens_k=known_k,
            page_size=page_size,
            num_blocks=num_blocks,
            slots=tensors.slots,
            windows={},
            built_in_capture=capturing(block_table.device),
            _given=tensors.given,
        )
        for window in asked:
            made.for_window(window)
        return made

    def prepare(
        self,
        cache: PagedKVCache,
        num_q_heads: int,
        window: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        workspace_tokens: int | None = None,
        path: str = "auto",
    ) -> None:
        """Make what a layer needs of the batch, so that a CUDA graph's capture may be the first to run that layer.

        Call it once for each kind of layer: layers that are alike in all arguments share what it makes. A layer that
        ran outside of a capture is prepared. Kernels are compiled when a layer first runs: run one eagerly as well.

        Args:
            cache: the layer's; another one of its shape and dtype does.
            num_q_heads: query heads, a multiple of the cache's KV heads.
            window, workspace_tokens, path: as `prefix_attention` will be given them.
            dtype: of q.

        Raises:
            TypeError, ValueError: an argument is wrong, or the batch was made for another cache.
            CaptureError: a CUDA graph is being captured.
        """
        check_may_make(self.device, self.built_in_capture, "what a layer needs")
        facts_of(self, cache, num_q_heads, dtype, window)  # checks these
        check_made_for(cache.geometry, "batch", self.page_size, self.num_blocks, self.device)
        if workspace_tokens is not None:
            workspace_tokens = check_int(workspace_tokens, "workspace_tokens", minimum=1)
        check_choice(path, "path", PATHS)
        route_of(self, cache, Layer(int(num_q_heads), dtype, window, workspace_tokens, path))

    def explain(
        self, cache: PagedKVCache, num_q_heads: int, window: int | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> str:
        """Say which path `path="auto"` takes for a layer, with which numbers, and where those come from.

        Args:
            cache: the layer's.
            num_q_heads: query heads, a multiple of the cache's KV heads.
            window: of the layer; None is none.
            dtype: of q.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        return explained(facts_of(self, cache, num_q_heads, dtype, window))

    def check(self, window: int | None = None) -> None:
        """Raise if the batch was built from a bad block table or bad offsets; waits for the device.

        Args:
            window: of all layers that read this table, where they have one: blocks that it never reaches may have been
                freed, and their entries may hold anything.

        Raises:
            TypeError, ValueError: `window` is neither None nor an int from 1 on.
            PlanError: with the sequence, and the column where it is about one.
        """
        window = check_window(window)
        table, offsets_q, offsets_k = (tensor.cpu() for tensor in self._given())
        lens_q = check_offsets(offsets_q, "q", self.total_q, self.seqlens_q)
        lens_k = check_offsets(offsets_k, "k", self.total_k, self.seqlens_k)
        for sequence, (new, tokens) in enumerate(zip(lens_q, lens_k, strict=True)):
            if new > tokens:
                raise PlanError(
                    f"sequence {sequence} has {new} new tokens among {tokens}; accepted: cu_seqlens_k counts both"
                )
            first = 0 if window is None else max(0, tokens - new - window + 1)
            check_row(table[sequence], sequence, first, tokens, self.page_size, self.num_blocks)
            for name, came, most in (("max_q", new, self.max_q), ("max_k", tokens, self.max_k)):
                if came > most:
                    raise PlanError(f"sequence {sequence} has {came} tokens; accepted: at most {name}, {most}")


def _certainly_good(block_table: object, cu_seqlens_q: object, cu_seqlens_k: object) -> bool:
    """Whether a table and its offsets pass every check: as they mostly come, contiguous; checked in 3 µs, not 15."""
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


def _one_window(window: object, name: str) -> int:
    if window is None:
        raise TypeError(f"{name} is None; accepted: an int from 1 on; layers without a window need no mention")
    checked = check_window(window, name)
    assert checked is not None
    return checked


def _listed(windows: object) -> list[Any]:
    if isinstance(windows, (str, bytes, Tensor)) or not isinstance(windows, Iterable):
        raise TypeError(f"windows is {described(windows)}; accepted: ints, such as (128,)")
    return list(windows)
