"""Loads of memory that nothing wrote: what counts as written, and by whom."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kvgather
from kvgather.lab.trace import Trace, trace

pytestmark = pytest.mark.triton
if kvgather.device.triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def read_kernel(x, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)

    @triton.jit
    def add_kernel(x, BLOCK: tl.constexpr):
        tl.atomic_add(x + tl.arange(0, BLOCK), 1.0)


def read(x: Tensor, out: Tensor | None = None) -> None:
    n = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    read_kernel[(1,)](x, torch.zeros(n, dtype=x.dtype) if out is None else out, n, BLOCK=triton.next_power_of_2(n))


def found(t: Trace) -> list[list[int]]:
    return [group.elements.tolist() for group in t.unwritten]


MAKERS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(4),
    "empty of a shape": lambda: torch.empty((2, 2), dtype=torch.int16),
    "empty_like": lambda: torch.empty_like(torch.zeros(4)),
    "empty_strided": lambda: torch.empty_strided((2, 2), (1, 2)),
    "new_empty": lambda: torch.zeros(1).new_empty(4),
    "new_empty_strided": lambda: torch.zeros(1).new_empty_strided((4,), (1,)),
    "a class": lambda: torch.Tensor(4),
    "bytes": lambda: torch.empty(4, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_way_to_make_an_empty_tensor(name: str) -> None:
    with trace(unwritten=True) as t:
        read(MAKERS[name]())
    assert found(t) == [[0, 1, 2, 3]]
    with trace() as t:
        read(MAKERS[name]())
    assert found(t) == []


def test_the_line_of_the_report() -> None:
    with trace(unwritten=True) as t:
        x = torch.empty(8)
        x[2:5] = 1
        read(x)
    line = t.report().splitlines()[1]
    assert line.endswith("in read_kernel(): load x, elements 0–1 and 5–7 of 8, which nothing wrote, first program (0,)")
    assert t.unwritten[0].reason == "unwritten" and not t.groups


def write_column(x: Tensor) -> None:
    x.view(2, 4)[:, 1] = 5


WRITES: dict[str, tuple[Callable[[Tensor], object], list[int]]] = {
    "fill": (lambda x: x.fill_(1), []),
    "a strided part": (write_column, [0, 2, 3, 4, 6, 7]),
    "copy": (lambda x: x[:3].copy_(torch.ones(3)), [3, 4, 5, 6, 7]),
    "out": (lambda x: torch.add(torch.ones(4), 1, out=x[:4]), [4, 5, 6, 7]),
    "a list": (lambda x: torch._foreach_zero_([x[:1], x[7:]]), [1, 2, 3, 4, 5, 6]),
    "random": (lambda x: x.normal_(), []),
    "index_put": (lambda x: x.index_put_((torch.tensor([3]),), torch.tensor(1.0)), []),  # all of its argument
    "numpy": (lambda x: x.numpy().fill(1), []),
    "dlpack": (lambda x: torch.from_dlpack(x).fill_(1), []),
    "a read": (lambda x: x.sum(), [0, 1, 2, 3, 4, 5, 6, 7]),
    "metadata": (lambda x: x.unsqueeze_(0).squeeze_(0), [0, 1, 2, 3, 4, 5, 6, 7]),
    "a kernel": (lambda x: read(torch.ones(3), x), [3, 4, 5, 6, 7]),
    "a resize": (lambda x: x.resize_(9), []),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_counts_as_a_write(name: str) -> None:
    write, left = WRITES[name]
    with trace(unwritten=True) as t:
        x = torch.empty(8)
        write(x)
        read(x[:8])
    assert found(t) == ([left] if left else [])


def test_a_kernel_writes_through_another_view_and_another_dtype() -> None:
    with trace(unwritten=True) as t:
        x = torch.empty(4, dtype=torch.int16)
        read(torch.ones(3, dtype=torch.uint8), x.view(torch.uint8)[2:])
        read(x)
    assert found(t) == [[0, 2, 3]]  # of element 2 one byte is written


def test_an_atomic_reads_and_writes() -> None:
    with trace(unwritten=True) as t:
        x = torch.empty(4)
        add_kernel[(2,)](x, BLOCK=4)
        read(x)
    assert [(g.kind, g.elements.tolist(), g.programs) for g in t.unwritten] == [("atomic", [0, 1, 2, 3], ((0,),))]


def test_memory_from_before_the_trace_and_results_count_as_written() -> None:
    before = torch.empty(4)
    with trace(unwritten=True) as t:
        read(before)
        read(torch.empty(4).clone())
        read(torch.zeros(4))
        read(torch.randn(4) + 1)
    assert found(t) == []


def test_freed_memory_is_forgotten() -> None:
    """The allocator gives the same address again and again."""
    with trace(unwritten=True) as t:
        for _ in range(20):
            read(torch.empty(1000).fill_(1))
            read(torch.zeros(1000))
    assert found(t) == []


def test_nothing_is_followed_after_the_trace() -> None:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    with trace(unwritten=True):
        assert _get_current_dispatch_mode_stack()
    assert not _get_current_dispatch_mode_stack() and not _get_current_function_mode_stack()


def test_the_gather_of_this_package_reads_only_what_was_written() -> None:
    with trace(unwritten=True) as t:
        cache = kvgather.PagedKVCache(4, 16, num_kv_heads=2, head_dim=16, layout="NHD", device="cpu")
        cache.write(*torch.ones(2, 20, 2, 16), torch.arange(20), backend="triton")
        plan = kvgather.GatherPlan.build(
            torch.tensor([[0, 1]]), torch.tensor([0, 20]), page_size=16, num_blocks=4
        )  # fmt: skip
        cache.gather(plan, backend="triton")
    assert t.launches and t.report().startswith("no access outside") and found(t) == []
