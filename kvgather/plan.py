"""GatherPlan: the page tiles of one batch, checked once per forward and shared by every layer.

A record is one page of one sequence: which block it is in, where its rows go, how many there are. The gather reads
records and nothing else, so a block table with a bad id in it can make rows of NaN but never an address outside the
pool.
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
    """The block table or the offsets a plan was built from are wrong; the message says where."""


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """Checked page records of one batch.

    Attributes:
        records: `[capacity, 4]` int32, contiguous: (block id or −1, first output row, rows, offset in the page of the
            first row). A sequence's pages begin at record `offset // page_size + 2 * sequence`, so that they can be
            found without those before; records between them have 0 rows, and are (−1, 0, 0, 0).
        total_tokens: rows the output must have; a capacity if it is larger than `cu_seqlens_k[-1]`.
        page_size, num_blocks: of the pool the plan was checked for.
    """

    records: Tensor
    total_tokens: int
    page_size: int
    num_blocks: int
    _batch: int
    _sources: Tensor  # what check() looks at, see `cut_sources`

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
        """Turn a block table into checked records, on its device.

        Args:
            block_table: `[batch, max_blocks]` int32 or int64. Entries past a sequence's length may hold anything.
            cu_seqlens_k: `[batch + 1]` int32 or int64: prefix sums of the tokens to gather, starting at 0.
            page_size: tokens per block.
            num_blocks: blocks of the pool; ids must be below it.
            total_tokens: rows of the output, at least `cu_seqlens_k[-1]`. When given, nothing waits for the device,
                and the call can be captured in a CUDA graph; when None, `cu_seqlens_k[-1]` is read.
            seq_starts: `[batch]` int32 or int64: position at which the gather of each sequence begins; None is 0.

        Returns:
            A plan. Bad contents do not raise here: an id outside the pool, or a position outside the table, becomes
            −1 and its rows come out NaN; offsets that fall or pass `total_tokens` are clamped. `check()` reports them.

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
        """`build`, of arguments that were checked."""
        device, batch = block_table.device, block_table.shape[0]
        capacity = -(-total_tokens // page_size) + 2 * batch if batch and total_tokens else 0

        sizes = _Sizes(page_size, num_blocks, total_tokens, capacity)
        if device.type == "cuda" and capacity and triton_available() and not torch.compiler.is_compiling():
            made = _plan_records()(block_table, cu_seqlens_k, seq_starts, *sizes)
        else:
            made = records_by_torch(block_table, cu_seqlens_k, seq_starts, *sizes)
        return cls(made[0], total_tokens, page_size, num_blocks, batch, made[1])

    def check(self) -> None:
        """Raise if the plan was built from a bad block table or bad offsets; waits for the device.

        Raises:
            PlanError: with the sequence and the column of the first bad entry, or the first bad offset.
        """
        given, origin = cut_sources(self._sources, self._batch)
        used = given.cummax(0).values.clamp(0, self.total_tokens)
        bad_offsets = (given != used).nonzero()
        if len(bad_offsets):
            at = int(bad_offsets[0])
            before = f", after {int(given[at - 1])}" if at else ""
            raise PlanError(
                f"cu_seqlens_k[{at}] is {int(given[at])}{before}; accepted: offsets that begin at 0, never fall, and "
                f"end at or below total_tokens, {self.total_tokens}"
            )
        if int(given[0]) != 0:
            raise PlanError(f"cu_seqlens_k[0] is {int(given[0])}; accepted: 0")
        bad = ((self.records[:, 0] < 0) & (self.records[:, 2] > 0)).nonzero()
        if len(bad) == 0:
            return
        sequence, column, block_id = (int(n) for n in origin[bad[0, 0]])
        where = f"block_table[{sequence}, {column}] (sequence {sequence}, column {column})"
        if column < 0:
            raise PlanError(
                f"{where} is before the sequence: seq_starts[{sequence}] is negative; accepted: 0 and above"
            )
        raise PlanError(
            f"{where} is {block_id}, or past the table's end; accepted: block ids 0 to {self.num_blocks - 1} in every "
            "column that the sequence's tokens reach"
        )


def check_table(
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    seq_starts: Tensor | None,
    names: tuple[str, str, str] = ("block_table", "cu_seqlens_k", "seq_starts"),
    device: torch.device | None = None,
) -> None:
    """Raise unless a block table, offsets and starts belong together.

    Args:
        block_table, cu_seqlens_k, seq_starts: as in `GatherPlan.build`.
        names: of the arguments, for errors.
        device: where they have to be; None is where the block table is.

    Raises:
        TypeError, ValueError: one has the wrong type, rank, size or device.
    """
    check_tensor(block_table, names[0], ndim=2, dtypes=INDEX_DTYPES, device=device)
    device, batch = block_table.device, block_table.shape[0]
    given = [(names[1], cu_seqlens_k, batch + 1)]
    if seq_starts is not None:
        given.append((names[2], seq_starts, batch))
    for name, tensor, length in given:
        check_tensor(tensor, name, ndim=1, dtypes=INDEX_DTYPES, device=device)
        if tensor.shape[0] != length:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted for {batch} sequences: [{length}]")


@functools.cache
def _plan_records() -> Callable[..., tuple[Tensor, Tensor]]:
    from .plan_kernel import plan_records  # needs triton, which this module does not

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
    """A plan's records, and where they come from (see `cut_sources`), in plain torch; arguments were checked.

    `plan_kernel.plan_records` makes the same in one launch.
    """
    device = block_table.device
    batch, columns = block_table.shape
    given = cu_seqlens_k.to(torch.int64, copy=True)  # the caller may reuse its buffer before check()
    if not capacity:
        return given.new_empty((0, 4), dtype=torch.int32), F.pad(given, (0, len(given) & 1))
    offsets = given.cummax(0).values.clamp(0, total_tokens)  # [batch + 1]
    first_record = offsets[:-1] // page_size + 2 * torch.arange(batch, device=device)  # [batch]
    record = torch.arange(capacity, device=device)
    sequence = torch.searchsorted(first_record, record, right=True) - 1  # [capacity]; −1 before the first
    in_use = sequence >= 0
    sequence = sequence.clamp(min=0)
    length = offsets.diff()[sequence]
    start = torch.zeros_like(sequence) if seq_starts is None else seq_starts.long()[sequence]
    nth = record - first_record[sequence]  # which page of its sequence
    first_offset = start.clamp(min=0) % page_size
    begin = torch.where(nth == 0, first_offset, 0)
    done = torch.where(nth == 0, 0, nth * page_size - first_offset)  # rows of earlier pages
    rows = torch.where(in_use, torch.minimum(page_size - begin, length - done).clamp(min=0), 0)
    in_use = rows > 0
    # A start near 2^63 can wrap around to a negative column.
    column = torch.where(start < 0, -1, start.clamp(min=0) // page_size + nth)
    present = in_use & (column >= 0) & (column < columns)
    at = column.clamp(0, max(columns - 1, 0))
    ids = block_table[sequence, at].long() if columns else torch.full_like(column, -1)
    ids = torch.where(present, ids, -1)
    block = torch.where((ids >= 0) & (ids < num_blocks), ids, -1)
    first_row = torch.where(in_use, offsets[:-1][sequence] + done, 0)
    records = torch.stack((block, first_row, rows, torch.where(in_use, begin, 0)), 1).int()
    origin = torch.stack((sequence, column, ids), 1)
    return records, torch.cat((F.pad(given, (0, len(given) & 1)), origin.flatten()))


def cut_sources(sources: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Where a plan's records come from, of one int64 allocation for both: for `check()`, which is rarely called.

    Returns:
        `[batch + 1]`, the offsets as they came; and `[capacity, 3]`, sequence, column and the id that the table has
        there (−1 if there is none) of each record. One number lies between them where that aligns the second.
    """
    return sources[: batch + 1], sources[batch + 1 + (batch + 1 & 1) :].view(-1, 3)


def _read_total(cu_seqlens_k: Tensor, rows: int) -> int:
    """cu_seqlens_k[-1]. Tokens past the table are the plan's to report, but a total that is far past everything the
    table could hold is garbage, and would only take the machine's memory."""
    total = int(cu_seqlens_k[-1])
    limit = min(max(4 * rows, 2**20), 2**31 - 1)
    if not 0 <= total <= limit:
        raise ValueError(f"cu_seqlens_k[-1] is {total}; accepted for a block table of {rows} positions: 0 to {limit}")
    return total
