"""Checks of chapter 04: rows by an index, a slot kernel, the reader's gather, and the bytes of V in SHUFFLE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgather.formats.layout import byte_offset, value_shape
from kvgather.lab.trace import Trace, trace
from kvgather.workbook.checks import NotYet, Wrong, exercise, expect


@exercise(
    "04.1",
    correct="every row is that of its slot, and exactly DIM lanes read and write",
    not_yet="no lane is active; which lanes have an element of the row?",
)
def rows_kernel(kernel: Any) -> None:
    for dim, lanes in ((24, 32), (20, 32), (32, 32), (33, 64)):
        _check_rows(kernel, dim, lanes)


def _check_rows(kernel: Any, dim: int, lanes: int) -> None:
    sizes = f"DIM {dim}, LANES {lanes}: "
    pool = torch.arange(6 * dim, dtype=torch.float32).reshape(6, dim)
    slots = torch.tensor([5, 0, 3], dtype=torch.int32)
    out = torch.full((3, dim), -1.0)
    with trace() as t:
        _launchable(kernel)[(3,)](out, pool, slots, DIM=dim, LANES=lanes)
    if not any(a.mask.any() for a in t.accesses if a.argument in ("out_ptr", "pool_ptr")):
        raise NotYet
    _no_violation(t, sizes)
    _lanes_of_one_row(t, dim, sizes)
    for row, slot in enumerate(slots.tolist()):
        came_from = _same_row(pool, out[row])
        if came_from is not None and came_from != slot:
            raise Wrong(f"{sizes}row {row} has the numbers of slot {came_from}; expected those of slot {slot}")
    expect(pool[slots.long()], out, f"{sizes}rows")


@exercise(
    "04.2",
    correct="every token has its slot, and no read is outside a tensor",
    not_yet="every token gets slot −1; replace this line",
)
def slots_kernel(kernel: Any) -> None:
    for page, block_ids, starts, lengths in (
        (4, [[7, 2, 5], [1, 4, 8], [9, 3, 6]], [3, 0, 6], [5, 0, 6]),
        (5, [[3, 8, 0, 11], [6, 10, 2, 7]], [4, 11], [3, 6]),
    ):
        _check_slots(_launchable(kernel), page, block_ids, starts, lengths)


def _check_slots(kernel: Any, page: int, block_ids: list[list[int]], starts: list[int], lengths: list[int]) -> None:
    block_table = torch.tensor(block_ids, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    batch = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    expected = [
        block_ids[b][(starts[b] + i) // page] * page + (starts[b] + i) % page
        for b, n in enumerate(lengths)
        for i in range(n)
    ]
    slots = torch.full((len(expected),), -1, dtype=torch.int32)
    seq_starts = torch.tensor(starts, dtype=torch.int32)
    with trace() as t:
        kernel[(len(expected),)](slots, batch, cu_seqlens, seq_starts, block_table, block_table.stride(0), page)
    if bool((slots == -1).all()) and not list(t.select("block_tables_ptr")):
        raise NotYet
    _no_violation(t)
    expect(expected, slots, f"slots (page {page}, seq_starts {starts}, lengths {lengths})")


@dataclass(frozen=True)
class _Batch:
    """A batch whose sequences own blocks in a mixed order; all other slots hold poison.

    The last sequence ends in the last slot of the pool where its length is a multiple of the page size, so that a
    lane too many leaves the pool.
    """

    page: int
    heads: int
    dim: int
    lengths: tuple[int, ...]
    scale: float

    @property
    def name(self) -> str:
        return f"page {self.page}, heads {self.heads}, dim {self.dim}, lengths {list(self.lengths)}"


BATCHES = (
    _Batch(16, 2, 32, (19, 5), 0.5),
    _Batch(5, 3, 12, (7, 0, 11, 1), 0.3),
    _Batch(3, 1, 40, (2, 6), 1.75),
)
POISON = 0x7E  # 448, the largest number of e4m3fn; no row of a sequence contains it


@exercise(
    "04.3",
    correct="your gather is right on all batches, touches nothing else, and no two programs write the same element",
    not_yet="the kernel reads and writes nothing yet",
)
def my_gather_kernel(kernel: Any) -> None:
    for batch in BATCHES:
        _check_gather(_launchable(kernel), batch)


def _check_gather(kernel: Any, batch: _Batch) -> None:
    total = sum(batch.lengths)
    generator = torch.Generator().manual_seed(batch.page)
    owned = [-(-length // batch.page) for length in batch.lengths]
    blocks = sum(owned) + 2
    order = torch.randperm(blocks - 1, generator=generator).tolist()  # two of them are left, and hold poison
    block_table = torch.full((len(owned), max(owned) + 1), order[-1], dtype=torch.int32)  # padding: a poisoned block
    for b, count in enumerate(owned):
        for column in range(count):
            block_table[b, column] = order.pop(0)
    block_table[-1, owned[-1] - 1] = blocks - 1
    cu_seqlens = torch.tensor([0, *batch.lengths]).cumsum(0, dtype=torch.int32)
    sequences = torch.arange(len(owned), dtype=torch.int32).repeat_interleave(torch.tensor(batch.lengths))
    places = [
        (int(block_table[b, i // batch.page]), i % batch.page) for b, n in enumerate(batch.lengths) for i in range(n)
    ]
    codes = torch.full((blocks, batch.page, batch.heads, batch.dim), POISON, dtype=torch.uint8)
    for block, page_offset in places:
        codes[block, page_offset] = torch.randint(0x78, (batch.heads, batch.dim), generator=generator)
    pool, scale = codes.view(torch.float8_e4m3fn), torch.tensor([batch.scale])
    out = torch.full((total, batch.heads, batch.dim), torch.nan)
    with trace() as t:
        kernel[(total, batch.heads)](
            out, pool, scale, block_table, cu_seqlens, sequences, block_table.stride(0), batch.heads,
            PAGE=batch.page, DIM=batch.dim, LANES=1 << (batch.dim - 1).bit_length(),
        )  # fmt: skip
    prefix = f"{batch.name}: "
    if not list(t.select("pool_ptr")) and not list(t.select("out_ptr")):
        raise NotYet
    _no_violation(t, prefix)
    _lanes_of_one_row(t, batch.dim, prefix)
    _right_rows(out, pool.float(), batch, places, prefix)
    if t.races:
        raise Wrong(f"{prefix}{t.races[0]}")


def _right_rows(out: Tensor, pool: Tensor, batch: _Batch, places: list[tuple[int, int]], prefix: str) -> None:
    """Raise `Wrong` if a gathered row differs; the message says where the row's numbers are from, if that is known."""
    expected = torch.stack([pool[block, page_offset] for block, page_offset in places])
    if torch.equal(out, expected):
        raise Wrong(f"{prefix}these are the numbers of the codes; the scale, {batch.scale}, is missing")
    rows = pool.reshape(-1, batch.dim)
    for token, (block, page_offset) in enumerate(places):
        for head in range(batch.heads):
            row, wanted = out[token, head], expected[token, head] * batch.scale
            if torch.equal(row, wanted):
                continue
            where = f"{prefix}token {token}, head {head}"
            if bool(row.isnan().all()):
                raise Wrong(f"{where} is not written")
            found = _same_row(rows * batch.scale, row)
            if found is None:
                found = _same_row(rows, row)
            if found is None:
                expect(wanted, row, where)
                continue
            slot, other = divmod(found, batch.heads)
            if bool((rows[found] == 448.0).all()):
                raise Wrong(f"{where} has numbers of a slot that no sequence owns (448 and its multiples are poison)")
            got = f"block {slot // batch.page}, page_offset {slot % batch.page}, head {other}"
            raise Wrong(
                f"{where} has the numbers of {got}; expected block {block}, page_offset {page_offset}, head {head}"
            )


@exercise("04.4", correct="these are the bytes in the trace")
def value_bytes(answer: Callable[..., Any]) -> None:
    for blocks, heads, page, dim in ((3, 2, 16, 32), (2, 3, 32, 16)):
        pool = torch.empty(value_shape("SHUFFLE", blocks, page, heads, dim, 1), dtype=torch.uint8)
        for block, head, page_offset in ((0, 0, 0), (1, 1, 3), (blocks - 1, heads - 1, page - 2)):
            expected = [byte_offset(pool, "SHUFFLE", "value", block, head, page_offset, d) for d in range(dim)]
            got = answer(block, head, page_offset, heads, page, dim)
            element = f"block {block}, head {head}, page_offset {page_offset}"
            expect(expected, got, f"{element} of {heads} heads, page {page}, head_dim {dim}")


def _launchable(kernel: Any) -> Any:
    """The kernel, if it was decorated; a check wraps a plain function, which has no grid."""
    if not hasattr(kernel, "run"):
        raise Wrong(f"{getattr(kernel, '__name__', 'it')} cannot be launched: the line @triton.jit above it is missing")
    return kernel


def _no_violation(t: Trace, prefix: str = "") -> None:
    """Raise `Wrong` with the first line of the trace's report, if an access is outside its tensor."""
    if t.groups:
        more = f" (and {len(t.groups) - 1} more)" if len(t.groups) > 1 else ""
        raise Wrong(f"{prefix}{t.groups[0]}{more}")


def _lanes_of_one_row(t: Trace, dim: int, prefix: str) -> None:
    """Raise `Wrong` for an access of the pool or the output with more enabled lanes than a row has elements."""
    for access in t.accesses:
        active = int(access.mask.sum())
        if access.argument in ("out_ptr", "pool_ptr") and active > dim:
            raise Wrong(
                f"{prefix}program {', '.join(map(str, access.program))}: a {access.kind} of {access.argument} has "
                f"{active} active lanes; a row has {dim} elements, and the others belong to the next row"
            )


def _same_row(rows: Tensor, row: Tensor) -> int | None:
    """The first of `rows` `[n, dim]` that equals `row`, or None."""
    equal = (rows == row).all(dim=1).nonzero()
    return int(equal[0]) if len(equal) else None
