"""Checks of chapter 05: the element that the kernel reads, the fence that proves it, and the fixed kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvgather.lab.crash import run_child
from kvgather.lab.planted import ARGUMENTS
from kvgather.lab.trace import Violation, trace
from kvgather.workbook.checks import NotYet, Wrong, exercise, expect


@exercise("05.1", correct="the kernel reads this element, whatever the scale's shape")
def element_read(answer: Callable[..., Any]) -> None:
    for heads, page in ((2, 16), (5, 8)):
        for block, head, page_offset in ((0, 0, 0), (4, 1, 3), (3, 0, 2), (6, 1, 7)):
            expected = (block * heads + head) * page + page_offset
            element = f"block {block}, head {head}, page_offset {page_offset}, {heads} heads, page {page}"
            expect(expected, answer(block, head, page_offset, heads, page), element)


@exercise(
    "05.2",
    correct="the child died on the line that reads element −1",
    not_yet="name an argument and a side, and the check fences it and runs the kernel in a child process",
)
def fence_it(argument: Any, side: Any) -> None:
    if argument not in ARGUMENTS:
        raise Wrong(f"argument is {argument!r}; accepted: {', '.join(ARGUMENTS)}")
    if side not in ("before", "after"):
        raise Wrong(f"side is {side!r}; accepted: 'before', 'after'")
    outcome = run_child("kvgather.lab.planted", argument, side)
    if outcome.kind == "ok":
        raise Wrong(f"the child ended with exit 0: the kernel touched nothing {side} {argument}")
    if outcome.kind != "segfault":
        raise Wrong(f"the child failed for another reason: {outcome}")


@exercise(
    "05.3",
    correct="right lengths, and no access outside a tensor",
    not_yet="the lengths are right, but the kernel still reads cu_seqlens_ptr at element -1",
)
def fixed_kernel(kernel: Any) -> None:
    lengths = [3, 0, 4, 1, 2]
    got = torch.full((5,), -1, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 3, 3, 7, 8, 10], dtype=torch.int32)
    with trace() as t:
        kernel[(1,)](got, cu_seqlens, 5, LANES=8)
    if [(v.argument, v.element) for v in t.violations] == [("cu_seqlens_ptr", -1)] and got.tolist() == lengths:
        raise NotYet
    if t.violations:
        first: Violation = t.violations[0]
        raise Wrong(f"a {first.kind} of {first.argument} at element {first.element}; it has {first.size}")
    expect(lengths, got.tolist(), "lengths of the sequences that begin at [0, 3, 3, 7, 8]")
