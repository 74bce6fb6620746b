"""Are these tensors of the kind that was checked before? Asked at every call, so asked of torch's own compiled check.

`torch.compile` guards what it compiled with a check of types, dtypes, devices, sizes, strides and dispatch keys (the
negative bit is one) that takes 0.1 µs a tensor, where Python's attributes take 1 µs. It is a private part of torch:
where it is missing, or is another, a check in Python does the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .signatures import signature

Sizes = Sequence[int | None]
"""A tensor's sizes or strides; None where any number will do."""


def guard(tensors: Sequence[Tensor], sizes: Sequence[Sizes], strides: Sequence[Sizes]) -> Callable[..., bool]:
    """A function of as many arguments that says whether they are tensors like these.

    Args:
        tensors: no tensor twice.
        sizes, strides: of each tensor; None in the place of those that may differ.

    Returns:
        False for what is no tensor, or of another type, dtype, device, size, stride, negative bit, or in another mode
        of torch (inference, grad, …); what it says nothing of are the address and the memory behind it.
    """
    torch_guards = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
    if torch_guards is not None:
        try:
            made = torch_guards(
                *tensors,
                dynamic_dims_sizes=[list(each) for each in sizes],
                dynamic_dims_strides=[list(each) for each in strides],
            ).check
            if made(*tensors) is True:
                return _unless_nested(made)
        except (AttributeError, RuntimeError, TypeError):
            pass
    return python_guard(tensors, sizes, strides)


def _unless_nested(check: Callable[..., bool]) -> Callable[..., bool]:
    """torch's check, kept from nested tensors: it requests their strides, which ends the process (torch 2.13).

    That takes 0.06 µs a tensor.
    """

    def torch_check(*others: Any) -> bool:
        try:
            for other in others:
                if other.is_nested:
                    return False
        except AttributeError:  # no tensor
            return False
        return check(*others)

    return torch_check


def python_guard(tensors: Sequence[Tensor], sizes: Sequence[Sizes], strides: Sequence[Sizes]) -> Callable[..., bool]:
    """`guard` without torch's own."""

    def kind(tensor: Tensor) -> tuple[object, ...]:
        return type(tensor), tensor.dtype, tensor.device, tensor.is_neg(), tensor.ndim

    def fits(numbers: Sequence[int], wanted: Sizes) -> bool:
        return all(want is None or number == want for number, want in zip(numbers, wanted, strict=True))

    kinds = [kind(tensor) for tensor in tensors]

    def check(*others: Any) -> bool:
        return len(others) == len(kinds) and all(
            isinstance(other, Tensor)
            and not other.is_nested
            and kind(other) == wanted
            and fits(other.shape, size)
            and fits(other.stride(), stride)
            for other, wanted, size, stride in zip(others, kinds, sizes, strides, strict=True)
        )

    return check


class Likeness:
    """What a few tensors are like, as a number: two sets of tensors have one number if a launch that was prepared for
    the one fits the other, and passed its checks. To see that nothing changed takes 1 µs a tensor, `signature` 2.
    """

    def __init__(self, tensors: Sequence[Tensor | None], others: Hashable) -> None:
        """Look at tensors, checked ones.

        Args:
            tensors: None where there is none.
            others: what else has to be equal for the numbers to be.
        """
        self._tensors = tuple(tensors)
        present = list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())
        self._present = tuple(present)
        self._memory = [(tensor.data_ptr(), tensor.untyped_storage().nbytes()) for tensor in present]
        self._unchanged = guard(present, [t.shape for t in present], [t.stride() for t in present])
        key = others, *(None if tensor is None else signature(tensor) for tensor in tensors)
        if len(_NUMBERS) >= 1024:  # an engine has one or two; a test suite with every shape there is has more
            _NUMBERS.clear()
        self.number = _NUMBERS.setdefault(key, next(_COUNT))

    def holds(self, *tensors: Tensor | None) -> bool:
        """Whether these are the very tensors that were looked at, in the memory that they had."""
        for tensor, known in zip(tensors, self._tensors, strict=True):
            if tensor is not known:
                return False
        for tensor, (address, size) in zip(self._present, self._memory, strict=True):
            if tensor.data_ptr() != address or tensor.untyped_storage().nbytes() != size:
                return False
        return self._unchanged(*self._present)


_NUMBERS: dict[Hashable, int] = {}
_COUNT = itertools.count()
