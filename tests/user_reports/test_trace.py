"""The trace reports reads outside a view, and nothing else.

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
    def add_strided(a, b, out, n, stride_a, stride_b):
        i = tl.arange(0, 8)
        x = tl.load(a + i * stride_a, mask=i < n, other=0)
        y = tl.load(b + i * stride_b, mask=i < n, other=0)
        tl.store(out + i, x + y, mask=i < n)

    @triton.jit
    def row_sums(x, out, rows, columns, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        pointers = x + tl.program_id(0) * columns + i
        total = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, columns, BLOCK):
            total += tl.load(pointers, mask=begin + i < columns, other=0.0)
            pointers += BLOCK  # outside the row after the last iteration, without a load
        tl.store(out + tl.program_id(0), tl.sum(total))


def elements(t: Trace) -> list[Any]:
    return [violation.element for violation in t.violations]


def strict_trace() -> AbstractContextManager[Trace]:
    return trace(strict=True)


def test_a_read_past_a_strided_view_is_reported() -> None:
    a, base, out = torch.arange(4), torch.arange(100), torch.zeros(4, dtype=torch.int64)
    with trace() as t:
        add_strided[(1,)](a, base[:5:2], out, 4, 1, 2)  # the view has three elements, the kernel reads four
    assert [(v.argument, v.element, v.size) for v in t.violations] == [("b", 6, 5)]
    with trace() as t:
        add_strided[(1,)](a, base[50:54], out, 4, 1, -1)  # reads before the view
    assert elements(t) == [-1, -2, -3]


def test_a_strict_trace_reports_a_read_between_the_elements_of_a_view() -> None:
    a, base, out = torch.arange(4), torch.arange(8), torch.zeros(4, dtype=torch.int64)
    for strict, expected in ((True, [1, 3]), (False, [])):
        with trace(strict=strict) as t:
            add_strided[(1,)](a, base[:7:2], out, 4, 1, 1)
        assert elements(t) == expected


def test_masked_lanes_and_unused_pointers_are_not_reported() -> None:
    x, out = torch.ones(3, 5), torch.zeros(3)
    with strict_trace() as t:
        row_sums[(3,)](x, out, 3, 5, BLOCK=4)
    assert not t.violations and out.tolist() == [5, 5, 5]


@pytest.mark.parametrize("kind", ["per-tensor", "per-head", "per-page-head", "per-token-head"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
def test_the_package_reads_nothing_between_the_elements_of_an_engines_views(kind: str, layout: str) -> None:
    """Pools and scales of every kind are views with gaps, and a strict trace reports a read in a gap."""
    shape = {"NHD": (4, 16, 2, 16), "HND": (4, 2, 16, 16), "SHUFFLE": (4, 2, 1, 16, 16)}[layout]
    both = torch.zeros(4, 2, *shape[1:], dtype=torch.uint8).view(torch.float8_e4m3fn)
    size = {"per-tensor": (1,), "per-head": (2,), "per-page-head": (4, 2), "per-token-head": (4, 2, 16)}[kind]
    scales = [torch.ones(*size, 3)[..., 1] for _ in "kv"]
    cache = kg.PagedKVCache.from_tensors(both[:, 0], both[:, 1], layout=layout, k_scale=scales[0], v_scale=scales[1])
    plan = kg.GatherPlan.build(
        torch.tensor([[3, 0], [2, -1]]), torch.tensor([0, 19, 30]), page_size=16, num_blocks=4,
        seq_starts=torch.tensor([5, 0]),
    )  # fmt: skip
    with strict_trace() as t:
        cache.write(*torch.ones(2, 3, 2, 16), torch.tensor([63, -1, 0]), backend="triton")
        cache.gather(plan, backend="triton")
    assert t.accesses and not t.violations, t.report()
