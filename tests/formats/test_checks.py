"""Argument checks: each error names the argument, its value and the accepted values."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgather.formats.checks import (
    as_float,
    check_choice,
    check_int,
    check_positive,
    check_tensor,
    check_window,
    described,
    resolved,
    share_elements,
)


def negative() -> torch.Tensor:
    """[-1., -2.] with the negative bit set: its memory contains 1 and 2."""
    view = torch.tensor([1 + 1j, 1 + 2j]).conj().imag
    assert view.is_neg() and view.tolist() == [-1, -2]
    return view


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nested tensors are a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, r"x is list \[1.0\]; accepted: a torch.Tensor"),
        ([torch.ones(1)], TypeError, r"x is list with tensors; accepted: a torch.Tensor"),
        (np.ones(2), TypeError, r"x is ndarray array\(\[1., 1.\]\); accepted: a torch.Tensor"),
        (10**5000, TypeError, r"x is int of too many digits to print; accepted: a torch.Tensor"),
        (torch.ones(2).double(), TypeError, r"x has dtype float64; accepted: float32"),
        (torch.ones(2).to_sparse(), ValueError, r"x has layout torch.sparse_coo; accepted: a dense"),
        (nested(), ValueError, r"x has layout nested; accepted: a dense"),
        (torch.ones(2, device="meta"), ValueError, r"x is on meta, which holds no values; accepted: a tensor on a GPU"),
        (negative(), ValueError, r"x has its negative bit set, .*; accepted: x.resolve_neg\(\)$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_tensor_rejects(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_tensor(value, "x", dtypes=(torch.float32,))


def test_resolved_clears_the_negative_bit_and_returns_other_values_unchanged() -> None:
    plain = resolved(negative())
    assert not plain.is_neg() and plain.tolist() == [-1, -2]
    assert check_tensor(plain, "x") is plain
    for value in (torch.ones(3)[::2], torch.ones(2, device="meta"), torch.ones(2).to_sparse(), None, "x", 3):
        assert resolved(value) is value


def test_check_tensor_accepts_a_fake_tensor() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2)
        assert check_tensor(fake, "x", dtypes=(torch.float32,), device=torch.device("cpu")) is fake


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), np.array(3)], ids=repr)
def test_check_int_accepts_integers_of_python_and_numpy(number: int) -> None:
    assert type(check_int(number, "n")) is int and check_int(number, "n") == 3


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (True, TypeError, r"n is bool True; accepted: an int"),
        (np.bool_(True), TypeError, r"n is bool .*True.*; accepted: an int"),
        (np.array([3]), TypeError, r"n is ndarray array\(\[3\]\); accepted: an int"),
        (np.array(2.5), TypeError, r"n is ndarray array\(2.5\); accepted: an int"),
        (np.float64(3), TypeError, r"n is float64 np.float64\(3.0\); accepted: an int"),
        (torch.tensor(3), TypeError, r"n is Tensor of shape \[\]; accepted: an int"),
        (nested(), TypeError, r"n is Tensor with a nested layout; accepted: an int"),
        (np.int64(-1), ValueError, r"n is -1; accepted: 0 to 2147483647"),
        (10**5000, ValueError, r"n is of too many digits to print; accepted: 0 to 2147483647"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_int_rejects(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_int(value, "n")


def test_as_float_and_check_positive() -> None:
    assert [as_float(x) for x in (2, 0.5, np.float32(0.5), np.int8(2))] == [2.0, 0.5, 0.5, 2.0]
    assert [as_float(x) for x in (10**400, -(10**400))] == [float("inf"), float("-inf")]
    assert [as_float(x) for x in (True, np.bool_(True), 1j, "1", None, torch.ones(()), np.ones(1))] == [None] * 7
    assert check_positive(np.float32(0.125), "softmax_scale") == 0.125
    with pytest.raises(TypeError, match=r"softmax_scale is str 'x'; accepted: None, or a number"):
        check_positive("x", "softmax_scale", "None, or a number")


def test_errors_truncate_long_values() -> None:
    with pytest.raises(ValueError, match=r"^layout is 'x{59}; accepted: NHD, HND$"):
        check_choice("x" * 10_000, "layout", ("NHD", "HND"))


def test_check_window() -> None:
    assert check_window(None) is None
    assert [check_window(n) for n in (1, np.int32(7), 2**31 - 1)] == [1, 7, 2**31 - 1]
    for bad in (0, -1):
        with pytest.raises(ValueError, match=rf"window is {bad}; accepted: 1 to 2147483647, or None for no window$"):
            check_window(bad)
    with pytest.raises(TypeError, match=r"windows\[2\] is float 4.0; accepted: an int, or None for no window$"):
        check_window(4.0, "windows[2]")


def test_described_never_prints_the_values_of_a_tensor() -> None:
    assert described(torch.ones(3, 2)) == "Tensor of shape [3, 2]"
    assert described((1, torch.ones(1))) == "tuple with tensors"
    assert described("x" * 100) == "str '" + "x" * 59


@st.composite
def views(draw: st.DrawFn, memory: torch.Tensor) -> torch.Tensor:
    """Any view of some bytes: elements of 1 to 4 bytes, up to three axes, with gaps and overlapping elements."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    base = memory[draw(st.integers(0, 3)) * dtype.itemsize :]
    base = base[: len(base) // dtype.itemsize * dtype.itemsize].view(dtype)
    sizes = draw(st.lists(st.integers(1, 4), max_size=3))
    strides = [draw(st.integers(0, 9)) for _ in sizes]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return base.as_strided(sizes, strides, base.storage_offset() + draw(st.integers(0, max(len(base) - reach, 0))))


def bytes_of(tensor: torch.Tensor) -> set[int]:
    """The address of each byte of each element."""
    first, size = tensor.data_ptr(), tensor.element_size()
    steps = product(*(range(n) for n in tensor.shape))
    starts = (sum(i * s for i, s in zip(index, tensor.stride(), strict=True)) for index in steps)
    return {first + start * size + byte for start in starts for byte in range(size)}


@given(st.data())
@settings(max_examples=300)
def test_share_elements_equals_a_comparison_of_all_bytes(data: st.DataObject) -> None:
    memory = torch.zeros(512, dtype=torch.uint8)
    first, second = data.draw(views(memory)), data.draw(views(memory))
    expected = bool(bytes_of(first) & bytes_of(second))
    assert share_elements(first, second) is share_elements(second, first) is expected


def test_share_elements_of_other_memory_empty_tensors_and_columns() -> None:
    rows = torch.zeros(3, 4)
    assert not share_elements(rows, torch.zeros(3, 4)) and not share_elements(rows, rows[:0])
    assert not share_elements(rows[:, ::2], rows[:, 1::2]) and share_elements(rows, rows[2:, 3])
