"""Which elements a view has: arithmetic on strides against the list of all its elements."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvgather.lab.extent import Extent, Members

AXES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), max_size=4)


@given(AXES)
def test_membership_is_that_of_the_listed_elements(axes: list[tuple[int, int]]) -> None:
    shape, strides = [size for size, _ in axes], [stride for _, stride in axes]
    listed = {
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, shape))
    }
    members = Members(shape, strides)
    assert members.span == max(listed) + 1
    element = np.arange(-3, members.span + 4)
    assert [int(e) for e in element[members.contains(element)]] == sorted(listed)
    assert members.has_gaps or len(listed) == members.span


def test_interleaved_axes_have_a_table_and_others_none() -> None:
    for shape, strides, nested in (
        ((4, 3), (6, 2), True),
        ((3, 2), (4, 6), False),
        ((2, 2), (4, 6), True),
        ((3, 4), (2, 1), True),
    ):
        members = Members(shape, strides)
        members.contains(np.arange(members.span))
        assert ("_table" not in members.__dict__) is nested, (shape, strides)


@pytest.mark.parametrize("step", [1, 2])
def test_a_view_of_eight_million_elements_takes_no_listing(step: int) -> None:
    view = torch.empty(4_000_000, 4)[:, :: 1 + step // 2][:, :2]
    extent, offset = Extent(view), np.arange(0, 64 * 4, 4)
    extent.place(offset, 4, True)
    started = time.perf_counter()
    for _ in range(100):
        extent.place(offset, 4, True)
    assert (time.perf_counter() - started) / 100 < 5e-3  # listing its elements took 60 ms
    assert extent.place(offset, 4, True).between.sum() == 32


def test_places_of_bytes() -> None:
    """A view of 3 rows of 2 of 4 int16, the middle of a storage of 20: elements 0, 1, 4, 5, 8, 9."""
    view = torch.zeros(20, dtype=torch.int16)[4:16].view(3, 4)[:, :2]
    extent = Extent(view)
    assert (extent.size, extent.itemsize) == (10, 2)
    for width, offset, outside, between, in_storage in (
        (2, 18, False, False, True),
        (2, 20, True, False, True),
        (2, 19, True, False, True),  # half of it
        (2, 4, False, True, True),
        (2, 3, False, True, True),
        (4, 0, False, False, True),
        (4, 2, False, True, True),  # its second half
        (8, 2, False, True, True),  # its middle: first and last element belong to the view
        (2, -8, True, False, True),
        (2, -9, True, False, False),
        (2, 30, True, False, True),
        (2, 31, True, False, False),
    ):
        place = extent.place(np.array([offset]), width, True)
        found = [bool(mask[0]) for mask in (place.outside, place.between, place.in_storage)]
        assert found == [outside, between, in_storage], (width, offset)
        assert not extent.place(np.array([offset]), width, False).between.any()


def test_no_elements_and_one_element() -> None:
    assert Extent(torch.zeros(3, 0)).size == 0
    assert Extent(torch.zeros(3, 0)).place(np.array([0]), 4, True).outside.all()
    assert Extent(torch.tensor(1.0)).place(np.array([0, 4]), 4, True).outside.tolist() == [False, True]
    assert Extent(torch.ones(1).expand(5)).size == 1
