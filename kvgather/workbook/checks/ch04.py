"""Checks of chapter 04: a slot kernel, a masked row kernel, and the bytes of V in SHUFFLE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvgather.formats.layout import byte_offset, value_shape
from kvgather.lab.trace import trace
from kvgather.workbook.checks import NotYet, Wrong, exercise, expect

PAGE = 4


@exercise(
    "04.1",
    correct="every token has its slot, and no read is outside a tensor",
    not_yet="every token gets slot −1; replace this line",
)
def slots_kernel(kernel: Any) -> None:
    lengths, starts = [5, 0, 6], [3, 0, 6]
    block_table = torch.tensor([[7, 2, 5], [1, 4, 8], [9, 3, 6]], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 5, 5, 11], dtype=torch.int32)
    batch = torch.tensor([0] * 5 + [2] * 6, dtype=torch.int32)
    expected = [
        int(block_table[b, (starts[b] + i) // PAGE]) * PAGE + (starts[b] + i) % PAGE
        for b, n in enumerate(lengths)
        for i in range(n)
    ]
    slots = torch.full((len(expected),), -1, dtype=torch.int32)
    seq_starts = torch.tensor(starts, dtype=torch.int32)
    with trace() as t:
        kernel[(len(expected),)](slots, batch, cu_seqlens, seq_starts, block_table, block_table.stride(0), PAGE)
    if bool((slots == -1).all()) and not list(t.select("block_tables_ptr")):
        raise NotYet
    _no_violation(t)
    expect(expected, slots, f"slots (page {PAGE}, seq_starts {starts}, lengths {lengths})")


@exercise(
    "04.2",
    correct="as many lanes are active as a row has elements, and no row overwrites the next",
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
        kernel[(3,)](out, pool, slots, DIM=dim, LANES=lanes)
    pool_accesses = [a for a in t.accesses if a.argument in ("out_ptr", "pool_ptr")]
    if not any(a.mask.any() for a in pool_accesses):
        raise NotYet
    _no_violation(t, sizes)
    for access in pool_accesses:
        active = int(access.mask.sum())
        if active > dim:
            raise Wrong(
                f"{sizes}program {access.program[0]}: a {access.kind} of {access.argument} has {active} "
                f"active lanes; a row has {dim} elements, and the others belong to the next row"
            )
    expect(pool[slots.long()], out, f"{sizes}rows")


@exercise("04.3", correct="these are the bytes in the trace")
def value_bytes(answer: Callable[..., Any]) -> None:
    for blocks, heads, page, dim in ((3, 2, 16, 32), (2, 3, 32, 16)):
        pool = torch.empty(value_shape("SHUFFLE", blocks, page, heads, dim, 1), dtype=torch.uint8)
        for block, head, page_offset in ((0, 0, 0), (1, 1, 3), (blocks - 1, heads - 1, page - 2)):
            expected = [byte_offset(pool, "SHUFFLE", "value", block, head, page_offset, d) for d in range(dim)]
            got = answer(block, head, page_offset, heads, page, dim)
            element = f"block {block}, head {head}, page_offset {page_offset}"
            expect(expected, got, f"{element} of {heads} heads, page {page}, head_dim {dim}")


def _no_violation(t: Any, prefix: str = "") -> None:
    if t.violations:
        v = t.violations[0]
        program = ", ".join(map(str, v.program))
        raise Wrong(
            f"{prefix}program {program}: a {v.kind} of {v.argument} at element {v.element}; it has {v.size} "
            f"({len(t.violations)} such accesses)"
        )
