"""The kernels of a batch's tensors give the bits that plain torch gives, for any contents, and stay inside."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import kvgather as kg
from kvgather.batch.contents import BatchTensors, Sizes
from kvgather.batch.reference import batch_tensors, window_offsets
from kvgather.device import has_gpu, interpreting
from kvgather.lab.child import environment
from kvgather.lab.trace import trace
from tests.where import on_each_device

TRACED_ON = "cuda" if has_gpu() and not interpreting() else "cpu"
INT64 = (-(2**63), 2**63 - 1)


@dataclass
class Given:
    """Arguments of `batch_tensors`."""

    table: Tensor
    cu_q: Tensor
    cu_k: Tensor
    sizes: Sizes

    def on(self, where: str) -> tuple[Any, ...]:
        return self.table.to(where), self.cu_q.to(where), self.cu_k.to(where), self.sizes


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, every second one of a larger tensor along each axis."""
    wide = torch.full([2 * size for size in tensor.shape], 3, dtype=tensor.dtype)
    view = wide[tuple(slice(0, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@st.composite
def batches(draw: st.DrawFn, most: int = 6) -> Given:
    batch, columns = draw(st.integers(0, most)), draw(st.integers(0, 5))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    page_size, num_blocks = draw(st.sampled_from([1, 3, 4, 16])), draw(st.integers(0, 9))
    limits = (-(2**31), 2**31 - 1) if dtype == torch.int32 else INT64
    any_number = st.sampled_from(limits) | st.integers(-3, 40)

    def offsets(longest: int) -> Tensor:
        if draw(st.booleans()):
            lengths = draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))
            numbers = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
        else:
            numbers = draw(st.lists(any_number, min_size=batch + 1, max_size=batch + 1))
        return torch.tensor(numbers, dtype=dtype)

    ids = draw(st.lists(any_number | st.integers(0, 9), min_size=batch * columns, max_size=batch * columns))
    tensors = [torch.tensor(ids, dtype=dtype).reshape(batch, columns), offsets(4), offsets(24)]
    if draw(st.booleans()):
        tensors = [spread(tensor) for tensor in tensors]
    room = max(columns, 1) * page_size
    sizes = Sizes(
        page_size, num_blocks, draw(st.integers(0, 50)), draw(st.integers(0, 200)), draw(st.integers(0, 5)),
        draw(st.integers(0, room)),
    )  # fmt: skip
    return Given(*tensors, sizes)


def assert_equal(ours: BatchTensors, theirs: BatchTensors) -> None:
    for name in ("table", "cu_q", "cu_k", "slots"):
        same(getattr(ours, name), getattr(theirs, name), name)
        assert getattr(ours, name).is_contiguous()
    for one, other in zip(ours.given(), theirs.given(), strict=True):
        same(one, other, "given")


def same(ours: Tensor, theirs: Tensor, name: str) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
    assert torch.equal(ours.cpu(), theirs.cpu()), name


def check_kernel(drawn: Given, window: int, where: str) -> None:
    want, got = (batch_tensors(*drawn.on(where), backend) for backend in ("torch", "triton"))
    assert_equal(got, want)
    for capacity in (7, 10**6):
        bounds = (drawn.sizes.max_q, window, capacity)
        pairs = (window_offsets(want.cu_q, want.cu_k, *bounds, backend) for backend in ("torch", "triton"))
        for theirs, ours in zip(*pairs, strict=True):
            same(ours, theirs, "window")


@on_each_device
@settings(max_examples=40)
@given(drawn=batches(), window=st.sampled_from([1, 2, 5, 100, 2**31 - 1]))
def test_the_kernel_gives_the_same_bits(drawn: Given, window: int, where: str) -> None:
    check_kernel(drawn, window, where)


@on_each_device
@pytest.mark.parametrize("batch", [16, 40, 257, 1025])
def test_more_sequences_than_one_step_takes(batch: int, where: str) -> None:
    """Steps are of 16 sequences in the interpreter; of 256, and of 1,024 for windows, on a GPU."""
    if where == "cpu" and batch > 40:
        pytest.skip("the interpreter takes minutes for so many programs, and has smaller steps")
    lens_q, lens_k = torch.randint(0, 4, (batch,)), torch.randint(0, 30, (batch,))
    offsets = [torch.cat((torch.zeros(1, dtype=torch.int64), lens.cumsum(0))) for lens in (lens_q, lens_k)]
    table = torch.randint(-1, 50, (batch, 8))
    for falls in (False, True):
        if falls:  # across the end of a step as well, in one and in the other
            far = min(batch, 30)
            for numbers, low, high in ((offsets[0], -2, int(offsets[0][far])), (offsets[1], 0, int(offsets[1][far]))):
                numbers[5], numbers[6], numbers[15] = high // 4, low, high
        sizes = Sizes(4, 48, int(lens_q.sum()) + 3, int(lens_k.sum()) + 3, 3, 25)
        check_kernel(Given(table, *offsets, sizes), 6, where)


@on_each_device
@pytest.mark.parametrize(("columns", "new"), [(1, 5000), (3000, 1), (2100, 1030)])
def test_long_rows_and_many_new_tokens(columns: int, new: int, where: str) -> None:
    """Of more than one step, and of more programs than one for a sequence."""
    table = torch.arange(3 * columns, dtype=torch.int32).reshape(3, columns)
    cu_q, cu_k = torch.tensor([0, new, new, new + 2]), torch.tensor([0, columns * 4, columns * 4, columns * 5 + 3])
    sizes = Sizes(4, 3 * columns, new + 2050, columns * 8, new, columns * 4)
    check_kernel(Given(table, cu_q, cu_k, sizes), 100, where)


@pytest.mark.triton
@settings(max_examples=15)
@given(drawn=batches(most=4))
def test_no_access_is_outside_its_tensor(drawn: Given) -> None:
    arguments = drawn.on(TRACED_ON)
    with trace(strict=True) as t:
        made = batch_tensors(*arguments, "triton")
        window_offsets(made.cu_q, made.cu_k, drawn.sizes.max_q, 3, 100, "triton")
    assert not t.violations, t.report()
    stores = {
        "checked_ptr": made.table, "used_q_ptr": made.cu_q, "used_k_ptr": made.cu_k, "slot_ptr": made.slots,
        "given_ptr": made.given()[0], "given_q_ptr": made.given()[1], "given_k_ptr": made.given()[2],
    }  # fmt: skip
    for name, tensor in stores.items():
        stored = [access for access in t.select(name, kind="store") if access.launch == 0]
        assert sum(int(access.mask.sum()) for access in stored) == tensor.numel(), f"{name}: every element, and once"
    for name in ("table_ptr", "cu_q_ptr", "cu_k_ptr"):
        assert not list(t.select(name, kind="store"))


@on_each_device
def test_nothing_of_an_allocation_is_the_callers(where: str) -> None:
    """The batch has memory of its own: what the caller writes later changes nothing."""
    tensors = [torch.tensor(numbers, device=where) for numbers in ([[1, 2], [3, 4]], [0, 1, 2], [0, 5, 8])]
    made = batch_tensors(*tensors, Sizes(4, 9, 2, 8, 1, 8), "triton")
    kept = [made.table, made.cu_q, made.cu_k, made.slots, *made.given()]
    before = [tensor.tolist() for tensor in kept]
    for tensor in tensors:
        tensor.fill_(-7)
    assert [tensor.tolist() for tensor in kept] == before


@pytest.mark.triton
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    env = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    child = subprocess.run(
        [sys.executable, "-P", "-m", "tests.batch._assembly_child"], env=env, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    sizes = json.loads(child.stdout.splitlines()[-1])
    # Shared memory of a block; Triton 3.9 needs none for one of them.
    assert len(sizes) == 3 * 5 and all(0 <= size <= 65_536 for size in sizes.values()), sizes


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_batch_and_a_window_are_three_launches(dtype: torch.dtype) -> None:
    """One for the batch; for a window one, and one for its plan."""
    tensors = [torch.tensor(n, dtype=dtype, device="cuda") for n in ([[7, 2, 5], [0, 9, 3]], [0, 2, 3], [0, 9, 14])]

    def build() -> kg.PrefixBatch:
        return kg.PrefixBatch.build(
            *tensors, page_size=4, num_blocks=10, seqlens_q=[2, 1], seqlens_k=[9, 5], windows=(3,)
        )

    build()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        build()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in events]
    assert len(names) == 3 and "batch_kernel" in names[0] and "window_kernel" in names[1], names
