"""Checks of chapter 05: which token reads an element, the fence that proves it, and the fixed kernel."""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch

from kvgather.lab.crash import run_child
from kvgather.lab.trace import Trace, Violation, trace
from kvgather.workbook.checks import NotYet, Wrong, exercise, expect


@exercise("05.1", correct="these are the block, the head and the page offset that read it")
def token_of(answer: Callable[..., Any]) -> None:
    for heads, page in ((2, 16), (5, 8)):
        for place in ((0, 0, 0), (4, 1, 3), (3, 0, 2), (6, 1, 7)):
            block, head, page_offset = place
            element = (block * heads + head) * page + page_offset
            expect(place, answer(element, heads, page), f"element {element}, {heads} heads, page {page}")


@exercise(
    "05.2",
    correct="the trace found element −1, and the child died on the line that loads it",
    not_yet="record a trace in `found` and return the tensors, one of them fenced",
)
def find_and_fence(found: Any, lay_out: Any) -> None:
    if not isinstance(found, Trace):
        raise Wrong(f"found is {type(found).__name__}; record it: with trace() as found: planted.run(…)")
    if ("cu_seqlens_ptr", -1) not in [(v.argument, v.element) for v in found.violations]:
        raise Wrong("found has no access outside cu_seqlens; call planted.run inside the with block")
    if not isinstance(lay_out, types.FunctionType):
        raise Wrong(f"lay_out is {type(lay_out).__name__}; keep it a function")
    source = textwrap.dedent(inspect.getsource(lay_out))
    outcome = run_child("kvgather.workbook.checks.ch05_child", lay_out.__name__, source)
    if outcome.kind == "ok":
        raise Wrong("the child ended with exit 0: the kernel touched no fence")
    if outcome.kind == "segfault" and "cu_seqlens_ptr + i - 1" in outcome.source:
        return
    if outcome.kind == "failed":
        raise Wrong(outcome.message)
    raise Wrong(f"the child died in another place: {outcome}")


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
