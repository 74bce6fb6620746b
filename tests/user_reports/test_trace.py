"""Reads outside a view, and no alarm where there are none.

Reported as triton-lang/triton#10336, Deep-Learning-Profiling-Tools/triton-viz#150, #169 and #368.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import kvgather as kg

pytestmark = pytest.mark.triton
if kg.device.triton_available():
    import triton
    import triton.language as tl

    from kvgather.lab.trace import Trace, trace

    @triton.jit
    def add_strided(a, b, out, n, step_a, step_b):
        at = tl.arange(0, 8)
        x = tl.load(a + at * step_a, mask=at < n, other=0)
        y = tl.load(b + at * step_b, mask=at < n, other=0)
        tl.store(out + at, x + y, mask=at < n)

    @triton.jit
    def row_sums(x, out, rows, columns, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        pointers = x + tl.program_id(0) * columns + at
        total = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, columns, BLOCK):
            total += tl.load(pointers, mask=begin + at < columns, other=0.0)
            pointers += BLOCK  # steps past the end after the last round, and is not read there
        tl.store(out + tl.program_id(0), tl.sum(total))


def elements(seen: Trace) -> list[Any]:
    return [violation.element for violation in seen.violations]


def strict_trace() -> AbstractContextManager[Trace]:
    return trace(strict=True)


def test_a_read_past_a_strided_view_is_seen_though_memory_may_follow() -> None:
    a, base, out = torch.arange(4), torch.arange(100), torch.zeros(4, dtype=torch.int64)
    with trace() as seen:
        add_strided[(1,)](a, base[:5:2], out, 4, 1, 2)  # three elements, read as four
    assert [(v.argument, v.element, v.size) for v in seen.violations] == [("b", 6, 5)]
    with trace() as seen:
        add_strided[(1,)](a, base[50:54], out, 4, 1, -1)  # before its beginning
    assert elements(seen) == [-1, -2, -3]


def test_a_read_between_the_elements_of_a_view_is_seen_by_a_strict_trace() -> None:
    a, base, out = torch.arange(4), torch.arange(8), torch.zeros(4, dtype=torch.int64)
    for strict, wanted in ((True, [1, 3]), (False, [])):
        with trace(strict=strict) as seen:
            add_strided[(1,)](a, base[:7:2], out, 4, 1, 1)
        assert elements(seen) == wanted


def test_masked_lanes_and_pointers_that_run_on_are_no_alarm() -> None:
    x, out = torch.ones(3, 5), torch.zeros(3)
    with strict_trace() as seen:
        row_sums[(3,)](x, out, 3, 5, BLOCK=4)
    assert not seen.violations and out.tolist() == [5, 5, 5]


@pytest.mark.parametrize("kind", ["per-tensor", "per-head", "per-page-head", "per-token-head"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
def test_the_package_reads_nothing_between_the_elements_of_an_engines_views(kind: str, layout: str) -> None:
    """Pools that are views with gaps, scales of every kind with gaps: strict, so a byte in a gap would be seen."""
    shape = {"NHD": (4, 16, 2, 16), "HND": (4, 2, 16, 16), "SHUFFLE": (4, 2, 1, 16, 16)}[layout]
    both = torch.zeros(4, 2, *shape[1:], dtype=torch.uint8).view(torch.float8_e4m3fn)
    size = {"per-tensor": (1,), "per-head": (2,), "per-page-head": (4, 2), "per-token-head": (4, 2, 16)}[kind]
    scales = [torch.ones(*size, 3)[..., 1] for _ in "kv"]
    cache = kg.PagedKVCache.from_tensors(both[:, 0], both[:, 1], layout=layout, k_scale=scales[0], v_scale=scales[1])
    plan = kg.GatherPlan.build(
        torch.tensor([[3, 0], [2, -1]]), torch.tensor([0, 19, 30]), page_size=16, num_blocks=4,
        seq_starts=torch.tensor([5, 0]),
    )  # fmt: skip
    with strict_trace() as seen:
        cache.write(*torch.ones(2, 3, 2, 16), torch.tensor([63, -1, 0]), backend="triton")
        cache.gather(plan, backend="triton")
    assert seen.accesses and not seen.violations, seen.report()
