"""The memory of a kernel's argument: its span, its storage, and which elements of its span a strided view has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Extent", "Members", "Place"]


class Members:
    """Which elements, counted from a view's first, belong to the view.

    The axes are ordered and merged once. If each stride exceeds the extent of the axes below it, membership is
    arithmetic: divide by each stride in turn, and nothing may remain. Views whose axes interleave need a table.

    Args:
        shape, strides: of a view with at least one element, in elements.
    """

    def __init__(self, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.axes = _merged(shape, strides)  # (stride, size), the largest stride first
        self.span = 1 + sum(stride * (size - 1) for stride, size in self.axes)
        self.has_gaps = any(stride != 1 for stride, _ in self.axes)
        inner = [sum(stride * (size - 1) for stride, size in self.axes[i + 1 :]) for i in range(len(self.axes))]
        self._nested = all(stride > extent for (stride, _), extent in zip(self.axes, inner, strict=True))

    def contains(self, element: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of the elements that belong to the view."""
        within = (element >= 0) & (element < self.span)
        if not self.has_gaps:
            return within
        if not self._nested:
            return within & self._table[np.where(within, element, 0)]
        rest = element.copy()
        for stride, size in self.axes:
            rest -= np.clip(rest // stride, 0, size - 1) * stride
        return within & (rest == 0)

    @cached_property
    def _table(self) -> NDArray[np.bool_]:
        """For each element of the span, whether the view has it. Each axis repeats what the axes before it cover."""
        table = np.zeros(self.span, bool)
        table[0] = True
        for stride, size in self.axes:
            done = 1
            while done < size:  # doubles the repetitions
                shift = min(done, size - done) * stride
                table[shift:] |= table[:-shift].copy()
                done += min(done, size - done)
        return table


def _merged(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """The axes as (stride, size) from the largest stride to the smallest, without repeats and with runs merged."""
    axes: list[tuple[int, int]] = []
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True)):
        if size == 1 or stride == 0:
            continue
        if axes:
            inner, count = axes[-1]
            if stride % inner == 0 and stride <= inner * count:  # continues the run below it, or overlaps it
                axes[-1] = (inner, count + (size - 1) * (stride // inner))
                continue
        axes.append((stride, size))
    return axes[::-1]


@dataclass(frozen=True)
class Place:
    """Where the lanes of one access are, as masks over the lanes.

    Attributes:
        outside: at least one byte is before the argument's first element or behind its last.
        between: all bytes are between first and last, and at least one belongs to no element of the argument.
        in_storage: all bytes are in the storage that the argument is a view of, so that a plain run can access them.
    """

    outside: NDArray[np.bool_]
    between: NDArray[np.bool_]
    in_storage: NDArray[np.bool_]


class Extent:
    """The memory that a tensor's elements take, and the storage around it."""

    def __init__(self, tensor: Tensor) -> None:
        self.itemsize = tensor.element_size()
        self.members = Members(tensor.shape, tensor.stride()) if tensor.numel() else None
        self.size = self.members.span if self.members else 0  # elements from the first to the last
        self._first = -tensor.storage_offset() * self.itemsize  # of the storage, in bytes from the tensor's first
        self._end = self._first + tensor.untyped_storage().nbytes()

    def place(self, offset: NDArray[np.int64], width: int, strict: bool) -> Place:
        """Where accesses are.

        Args:
            offset: each lane's first byte, from the tensor's first element.
            width: bytes per lane.
            strict: whether to look for `between`.
        """
        outside = (offset < 0) | (offset + width > self.size * self.itemsize)
        between = np.zeros_like(outside)
        if strict and self.members is not None and self.members.has_gaps:
            for byte in (*range(0, width, self.itemsize), width - 1):
                between |= ~self.members.contains((offset + byte) // self.itemsize)
            between &= ~outside
        return Place(outside, between, (offset >= self._first) & (offset + width <= self._end))
