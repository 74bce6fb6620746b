"""Launches: strides as kernels take them, launches that are prepared once, and the interpreter's silence."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvgather.device import interpreting, triton_available
from tests.where import interpreted, on_each_device

pytestmark = pytest.mark.triton
if triton_available():
    import triton
    import triton.language as tl

    from kvgather.kernels import launch
    from kvgather.kernels.launch import PreparedLaunch, granule, inner_extent, launching, prepared_once

    @triton.jit(do_not_specialize=["addend", "n"])
    def shift_kernel(in_ptr, by, out_ptr, addend, n, strides, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        given = tl.load(in_ptr + at * strides[0], mask=at < n, other=0).to(tl.float32)
        tl.store(out_ptr + at * strides[1], given * FACTOR + by + addend, mask=at < n)


@pytest.mark.parametrize(
    "pool", [torch.empty(3, 4, 2, 5), torch.empty(3, 8, 4, 6)[:, ::2, 1:3, ::3], torch.empty(2, 1, 1)]
)
def test_the_inner_extent_is_the_farthest_offset_of_one_block(pool: Tensor) -> None:
    offsets = [
        sum(index * stride for index, stride in zip(place, pool.stride()[1:], strict=True))
        for place in itertools.product(*map(range, pool.shape[1:]))
    ]
    assert inner_extent(pool) == max(offsets)


@pytest.mark.parametrize(
    ("strides", "itemsize", "align"),
    [
        ((1024, 64, 16), 1, 1),  # Triton sees multiples of 16 itself
        ((0, 64), 2, 1),
        ((1024, 8), 2, 8),  # 8 of 2 bytes are 16 bytes, which it does not look for
        ((1024, 4), 2, 4),
        ((1024, 8), 4, 4),  # 4 of 4 bytes are enough
        ((24, 40), 1, 8),
        ((1024, 3), 1, 1),
    ],
)
def test_granules_by_hand(strides: tuple[int, ...], itemsize: int, align: int) -> None:
    assert granule(strides, itemsize) == align
    assert all(stride % align == 0 for stride in strides) and align * itemsize <= 16


def test_a_launch_is_prepared_once_for_each_kind_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PREPARED", {})
    made: list[object] = []

    def get(kind: str, key: int) -> object:
        return prepared_once(kind, key, lambda: made.append((kind, key)) or object())

    assert get("a", 1) is get("a", 1) and get("a", 1) is not get("a", 2) and get("a", 1) is not get("b", 1)
    assert made == [("a", 1), ("a", 2), ("b", 1)]
    first = get("a", 1)
    for key in range(5000):
        assert get("many", key) is get("many", key)
        assert len(launch._PREPARED) <= 1024, "memory is bounded"
    assert get("a", 1) is not first, "forgotten meanwhile, and made anew"


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_prepared_launch_takes_other_tensors_and_numbers(dtype: torch.dtype, where: str) -> None:
    """FP8 goes as its codes, in uint8; `by` is a tensor's place that a number takes."""
    views = (torch.uint8 if dtype.itemsize == 1 else None, None, None)
    constants: dict[str, Any] = {"FACTOR": 2, "BLOCK": 16}
    ready = PreparedLaunch(shift_kernel, views, ((2, 3),), constants, interpreting())
    for n, by, addend in ((40, 0.5, 3), (40, 0.25, 9), (17, 0.5, 1)):
        wide = torch.randn(2 * n, device=where).to(dtype)
        out = torch.zeros(3 * n, device=where)
        ready(-(-n // 16), (wide, by, out), (wide.data_ptr(), by, out.data_ptr()), (addend, n))
        given = (wide.view(torch.uint8) if dtype.itemsize == 1 else wide)[::2].float()
        assert torch.equal(out[::3], given * 2 + by + addend)
        assert not out[1::3].any() and not out[2::3].any()


@on_each_device
def test_an_empty_grid_launches_nothing(where: str) -> None:
    out = torch.zeros(4, device=where)
    ready = PreparedLaunch(shift_kernel, (None,) * 3, ((1, 1),), {"FACTOR": 1, "BLOCK": 4}, interpreting())
    ready(0, (out, 1.0, out), (out.data_ptr(), 1.0, out.data_ptr()), (1, 4))
    assert not out.any()


@interpreted
def test_the_interpreter_overflows_in_silence_and_no_one_else() -> None:
    large = np.array([3e38], np.float32)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        with launching(torch.empty(1), True):
            assert np.isinf(large * 10).all() and np.isnan(np.nanmax(np.array([np.nan])))
        assert not raised
        _ = large * 10
        assert [w.category for w in raised] == [RuntimeWarning]
