"""What a launch changed, compared with what it should have changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Contents", "difference"]

WHOLE = 2**20
"""Storages up to this size in bytes are compared whole, larger ones where the tensor has elements."""


def difference(expected: Tensor, got: Tensor, name: str, tolerance: float = 0.0) -> str | None:
    """The first element that differs, such as "out[4, 0]: expected 1.5, got 0 (8 of 96 differ)", or None.

    Args:
        expected, got: tensors of the same shape; NaN equals NaN.
        name: the tensor's name in the message.
        tolerance: largest accepted difference, relative to the expected number (absolute below 1).
    """
    if got.shape != expected.shape:
        return f"{name}: expected shape {list(expected.shape)}, got {list(got.shape)}"
    left, right = expected.double(), got.double()
    same = (
        (left == right) | (left.isnan() & right.isnan()) | ((left - right).abs() <= tolerance * left.abs().clamp(min=1))
    )
    if bool(same.all()):
        return None
    index = [int(i) for i in (~same).nonzero()[0]]
    count = f"{int((~same).sum())} of {same.numel()} differ"
    return f"{name}{index}: expected {left[tuple(index)]:.6g}, got {right[tuple(index)]:.6g} ({count})"


class Contents:
    """The contents of tensors at one moment, bit for bit; memory between the elements of a view counts too."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        self._bytes = {name: _bytes(tensor).clone() for name, tensor in self._tensors.items()}

    def changed(self) -> list[str]:
        """The names of the tensors whose memory differs now."""
        return [name for name, tensor in self._tensors.items() if not torch.equal(self._bytes[name], _bytes(tensor))]


def _bytes(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    if storage.nbytes() <= WHOLE:
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    return tensor.contiguous().view(torch.uint8)
