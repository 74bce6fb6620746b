"""Guards: a fast test whether the tensors of a call match those of a call that passed the checks.

`torch.compile` guards compiled code by a C++ check of types, dtypes, devices, sizes, strides and dispatch keys (the
negative bit is one). It takes 0.1 µs a tensor; the same check of Python attributes takes 1 µs. The C++ check is private
to torch: if it is missing or incompatible, the check in Python replaces it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .signatures import signature

Sizes = Sequence[int | None]
"""A tensor's sizes or strides; None accepts any number."""


def guard(tensors: Sequence[Tensor], sizes: Sequence[Sizes], strides: Sequence[Sizes]) -> Callable[..., bool]:
    """Return a function that tests whether its arguments match these tensors, one argument for each tensor.

    Args:
        tensors: distinct tensors.
        sizes, strides: of each tensor; None for those that may differ.

    Returns:
        A function that returns False if an argument is not a tensor, if its type, dtype, device, sizes, strides or
        negative bit differ, or if torch is in another mode (inference, grad, …). It does not test the address or the
        storage.
    """
    torch_guards = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
    if torch_guards is not None:
        try:
            check = torch_guards(
                *tensors,
                dynamic_dims_sizes=[list(each) for each in sizes],
                dynamic_dims_strides=[list(each) for each in strides],
            ).check
            if check(*tensors) is True:
                return _unless_nested(check)
        except (AttributeError, RuntimeError, TypeError):
            pass
    return python_guard(tensors, sizes, strides)


def guard_of(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A `guard` for tensors of exactly these sizes and strides, created once for all that are alike.

    Returns:
        The guard; None if a tensor occurs twice.
    """
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return None
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = [(type(t), t.dtype, t.device, t.shape, t.stride(), t.is_neg(), t.requires_grad) for t in tensors]
    key = (modes, *kinds)
    found = _GUARDS.get(key)
    if found is None or not found(*tensors):
        if len(_GUARDS) >= 1024:  # as `Likeness`
            _GUARDS.clear()
        found = _GUARDS[key] = guard(tensors, [t.shape for t in tensors], [t.stride() for t in tensors])
    return found


_GUARDS: dict[Hashable, Callable[..., bool]] = {}


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
    """`guard` in Python, without torch's private check."""

    def kind(tensor: Tensor) -> tuple[object, ...]:
        return type(tensor), tensor.dtype, tensor.device, tensor.is_neg(), tensor.ndim

    def fits(numbers: Sequence[int], expected: Sizes) -> bool:
        return all(size is None or number == size for number, size in zip(numbers, expected, strict=True))

    kinds = [kind(tensor) for tensor in tensors]

    def check(*others: Any) -> bool:
        return len(others) == len(kinds) and all(
            isinstance(other, Tensor)
            and not other.is_nested
            and kind(other) == expected
            and fits(other.shape, size)
            and fits(other.stride(), stride)
            for other, expected, size, stride in zip(others, kinds, sizes, strides, strict=True)
        )

    return check


class Likeness:
    """A number for the signatures of a group of tensors.

    Two groups with the same number pass the same checks and can use the same prepared launches. `is_current` takes
    1 µs a tensor, computing a `signature` 2 µs.

    Attributes:
        number: the number.
        addresses: of the tensors; 0 for a missing one.
    """

    def __init__(self, tensors: Sequence[Tensor | None], properties: Hashable) -> None:
        """Compute the number of checked tensors.

        Args:
            tensors: the group; None for a missing tensor.
            properties: further properties that groups with the same number share.
        """
        self._tensors = tuple(tensors)
        self._distinct = list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())
        self._memory = self._memory_now()
        self._matches = guard(self._distinct, [t.shape for t in self._distinct], [t.stride() for t in self._distinct])
        self.addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        key = properties, *(None if tensor is None else signature(tensor) for tensor in tensors)
        if len(_NUMBERS) >= 1024:  # an engine needs one or two; a test suite with all shapes needs more
            _NUMBERS.clear()
        self.number = _NUMBERS.setdefault(key, next(_COUNT))

    def is_current(self, *tensors: Tensor | None) -> bool:
        """Whether these are the same tensor objects, with unchanged properties and memory."""
        return (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and self._memory_now() == self._memory
            and self._matches(*self._distinct)
        )

    def _memory_now(self) -> list[tuple[int, int]]:
        """The address of each tensor, and the bytes of its storage, which is not kept: an engine may free it."""
        return [(tensor.data_ptr(), tensor.untyped_storage().nbytes()) for tensor in self._distinct]


_NUMBERS: dict[Hashable, int] = {}
_COUNT = itertools.count()
