"""GatherPlan: the page records of one batch, checked once per forward and shared by all layers.

A record describes one page of one sequence: its block id, its first output row and its number of rows. The gather reads
only records: a bad id in the block table can produce rows of NaN, but never an address outside the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import triton_available
from .formats.checks import check_int, check_tensor

INDEX_DTYPES = (torch.int32, torch.int64)


class PlanError(ValueError):
    """The block table or the offsets of a plan or a batch are wrong; the message gives the position."""


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """Checked page records of one batch.

    Attributes:
        records: `[capacity, 4]` int32, contiguous: (block id or −1, first output row, rows, page offset of the first
            row). The pages of a sequence begin at record `cu_seqlens_k[sequence] // page_size + 2 * sequence`, which
            depends on no other sequence's pages. Unused records have 0 rows: (−1, 0, 0, 0).
        total_tokens: rows of the output; a capacity if it is larger than `cu_seqlens_k[-1]`.
        page_size, num_blocks: of the pool that the plan was checked for.
    """

    records: Tensor
    total_tokens: int
    page_size: int
    num_blocks: int
    _batch: int
    _sources: Tensor  # read by check(), see `cut_sources`

    @property
    def device(self) -> torch.device:
        return self.records.device

    @classmethod
    def build(
        cls,
        block_table: Tensor,
        cu_seqlens_k: Tensor,
        *,
        page_size: int,
        num_blocks: int,
        total_tokens: int | None = None,
        seq_starts: Tensor | None = None,
    ) -> GatherPlan:
        """Build checked records from a block table, on its device.

        Args:
            block_table: `[batch, max_blocks]` int32 or int64. Entries past a sequence's length are ignored.
            cu_seqlens_k: `[batch + 1]` int32 or int64: prefix sums of the tokens to gather, starting at 0.
            page_size: tokens per block.
            num_blocks: blocks of the pool; ids must be below it.
            total_tokens: rows of the output, at least `cu_seqlens_k[-1]`. With a value the call does not synchronize
                and can be captured in a CUDA graph; None reads `cu_seqlens_k[-1]`.
            seq_starts: `[batch]` int32 or int64: position at which the gather of each sequence begins; None means 0.

        Returns:
            A plan. Bad contents do not raise here: an id outside the pool, or a position outside the table, becomes −1
            and its rows are NaN; offsets that decrease or exceed `total_tokens` are clamped. `check()` reports them.

        Raises:
            TypeError, ValueError: an argument has the wrong type, rank, size or device.
        """
        check_table(block_table, cu_seqlens_k, seq_starts)
        batch, columns = block_table.shape
        page_size = check_int(page_size, "page_size", minimum=1)
        num_blocks = check_int(num_blocks, "num_blocks")
        if total_tokens is None:
            total_tokens = _read_total(cu_seqlens_k, rows=batch * columns * page_size)
        total_tokens = check_int(total_tokens, "total_tokens")
        return cls.of_checked(block_table, cu_seqlens_k, seq_starts, page_size, num_blocks, total_tokens)

    @classmethod
    def of_checked(
        cls,
        block_table: Tensor,
        cu_seqlens_k: Tensor,
        seq_starts: Tensor | None,
        page_size: int,
        num_blocks: int,
        total_tokens: int,
    ) -> GatherPlan:
        """`build` from checked arguments."""
        device, batch = block_table.device, block_table.shape[0]
        capacity = -(-total_tokens // page_size) + 2 * batch if batch and total_tokens else 0

        sizes = _Sizes(page_size, num_blocks, total_tokens, capacity)
        if device.type == "cuda" and capacity and triton_available() and not torch.compiler.is_compiling():
            records, sources = _plan_records()(block_table, cu_seqlens_k, seq_starts, *sizes)
        else:
            records, sources = records_by_torch(block_table, cu_seqlens_k, seq_starts, *sizes)
        return cls(records, total_tokens, page_size, num_blocks, batch, sources)

    def check(self) -> None:
        """Raise if the plan was built from a bad block table or bad offsets. Synchronizes with the device.

        Raises:
            PlanError: gives the sequence and the column of the first bad entry, or the first bad offset.
        """
        offsets, origin = cut_sources(self._sources, self._batch, self.records.shape[0])
        clamped = offsets.cummax(0).values.clamp(0, self.total_tokens)
        bad_offsets = (offsets != clamped).nonzero()
        if len(bad_offsets):
            index = int(bad_offsets[0])
            previous = f", after {int(offsets[index - 1])}" if index else ""
            raise PlanError(
                f"cu_seqlens_k[{index}] is {int(offsets[index])}{previous}; accepted: offsets that begin at 0, never "
                f"decrease, and end at or below total_tokens, {self.total_tokens}"
            )
        if int(offsets[0]) != 0:
            raise PlanError(f"cu_seqlens_k[0] is {int(offsets[0])}; accepted: 0")
        bad = ((self.records[:, 0] < 0) & (self.records[:, 2] > 0)).nonzero()
        if len(bad) == 0:
            return
        sequence, column, block_id = (int(n) for n in origin[bad[0, 0]])
        entry = f"block_table[{sequence}, {column}] (sequence {sequence}, column {column})"
        if column < 0:
            raise PlanError(
                f"{entry} is before the sequence: seq_starts[{sequence}] is negative; accepted: 0 and above"
            )
        raise PlanError(
            f"{entry} is {block_id}, or past the table's end; accepted: block ids 0 to {self.num_blocks - 1} in every "
            "column that the sequence's tokens reach"
        )


def check_table(
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    seq_starts: Tensor | None,
    names: tuple[str, str, str] = ("block_table", "cu_seqlens_k", "seq_starts"),
    device: torch.device | None = None,
) -> None:
    """Raise unless a block table, its offsets and its starts match.

    Args:
        block_table, cu_seqlens_k, seq_starts: as in `GatherPlan.build`.
        names: the arguments' names, for errors.
        device: the required device; None means the block table's.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device.
    """
    check_tensor(block_table, names[0], ndim=2, dtypes=INDEX_DTYPES, device=device)
    device, batch = block_table.device, block_table.shape[0]
    vectors = [(names[1], cu_seqlens_k, batch + 1)]
    if seq_starts is not None:
        vectors.append((names[2], seq_starts, batch))
    for name, tensor, length in vectors:
        check_tensor(tensor, name, ndim=1, dtypes=INDEX_DTYPES, device=device)
        if tensor.shape[0] != length:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted for {batch} sequences: [{length}]")


@functools.cache
def _plan_records() -> Callable[..., tuple[Tensor, Tensor]]:
    from .plan_kernel import plan_records  # imports triton, which may be missing

    return plan_records


class _Sizes(NamedTuple):
    page_size: int
    num_blocks: int
    total_tokens: int
    capacity: int


def records_by_torch(
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    seq_starts: Tensor | None,
    page_size: int,
    num_blocks: int,
    total_tokens: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Compute a plan's records and their sources (see `cut_sources`) in plain torch, from checked arguments.

    `plan_kernel.plan_records` computes the same in one launch.
    """
    device = block_table.device
    batch, columns = block_table.shape
    input_offsets = cu_seqlens_k.to(torch.int64, copy=True)  # the caller may reuse its buffer before check()
    padding = (0, len(input_offsets) & 1)
    if not capacity:
        return input_offsets.new_empty((0, 4), dtype=torch.int32), F.pad(input_offsets, padding)
    offsets = input_offsets.cummax(0).values.clamp(0, total_tokens)  # [batch + 1]
    first_record = offsets[:-1] // page_size + 2 * torch.arange(batch, device=device)  # [batch]
    record = torch.arange(capacity, device=device)
    sequence = torch.searchsorted(first_record, record, right=True) - 1  # [capacity]; −1 before the first sequence
    in_use = sequence >= 0
    sequence = sequence.clamp(min=0)
    length = offsets.diff()[sequence]
    start = torch.zeros_like(sequence) if seq_starts is None else seq_starts.long()[sequence]
    page = record - first_record[sequence]  # counted from the sequence's first page
    start_offset = start.clamp(min=0) % page_size
    page_offset = torch.where(page == 0, start_offset, 0)
    earlier_rows = torch.where(page == 0, 0, page * page_size - start_offset)  # in the sequence's earlier pages
    rows = torch.where(in_use, torch.minimum(page_size - page_offset, length - earlier_rows).clamp(min=0), 0)
    in_use = rows > 0
    # A start near 2^63 can overflow to a negative column.
    column = torch.where(start < 0, -1, start.clamp(min=0) // page_size + page)
    in_table = in_use & (column >= 0) & (column < columns)
    safe_column = column.clamp(0, max(columns - 1, 0))
    ids = block_table[sequence, safe_column].long() if columns else torch.full_like(column, -1)
    ids = torch.where(in_table, ids, -1)
    block = torch.where((ids >= 0) & (ids < num_blocks), ids, -1)
    first_row = torch.where(in_use, offsets[:-1][sequence] + earlier_rows, 0)
    records = torch.stack((block, first_row, rows, torch.where(in_use, page_offset, 0)), 1).int()
    origin = torch.stack((sequence, column, ids), 1)
    return records, torch.cat((F.pad(input_offsets, padding), origin.flatten()))


def cut_sources(sources: Tensor, batch: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Split the allocation that begins with the sources of a plan's records, int64, which only `check()` reads.

    Returns:
        The offsets before clamping, `[batch + 1]`; and the sequence, the column and the block table's entry (−1 if the
        column is outside the table) of each record, `[capacity, 3]`. One unused element separates the two if the
        second would not be aligned otherwise.
    """
    wide = sources.view(torch.int64)
    begin = batch + 1 + (batch + 1 & 1)
    return wide[: batch + 1], wide[begin : begin + 3 * capacity].view(-1, 3)


def _read_total(cu_seqlens_k: Tensor, rows: int) -> int:
    """Read cu_seqlens_k[-1].

    `GatherPlan.check` reports tokens past the table. A total far beyond the table's capacity is garbage and would
    exhaust the machine's memory, so it raises here.
    """
    total = int(cu_seqlens_k[-1])
    limit = min(max(4 * rows, 2**20), 2**31 - 1)
    if not 0 <= total <= limit:
        raise ValueError(f"cu_seqlens_k[-1] is {total}; accepted for a block table of {rows} positions: 0 to {limit}")
    return total
