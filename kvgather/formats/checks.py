"""Argument checks of all public functions. Each error names the argument, its value and the accepted values."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def described(value: object) -> str:
    """Describe a value for an error message: its type and the start of its repr, or the shape of a tensor.

    Printing a tensor's values would synchronize with the GPU, and could read past the tensor's memory.
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} with a nested layout" if value.is_nested else f"{kind} of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"{kind} with tensors"
    return f"{kind} {shown(value)}"


def shown(value: object) -> str:
    """Return the start of a value's repr. Python refuses to print integers of more than 4300 digits."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "of too many digits to print"


def resolved(value: Value) -> Value:
    """Return a copy of a tensor whose negative bit is set, such as `x.conj().imag`, with its signs resolved.

    Every other value is returned unchanged. For small arguments that are only read: kernels and views of another
    dtype read the bytes, which lack the sign. `check_tensor` rejects a tensor with the bit set.
    """
    if isinstance(value, Tensor) and value.is_neg():
        return value.resolve_neg()  # type: ignore[return-value]
    return value


def check_tensor(
    value: object,
    name: str,
    *,
    ndim: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return `value` if it is a dense tensor of an accepted rank, dtype and device, inside its storage.

    Raises:
        TypeError: `value` is not a tensor, or its dtype is not accepted.
        ValueError: its rank, device or layout is not accepted, its strides reach past its storage, it is on the meta
            device, or its negative bit is set (see `resolved`).
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {described(value)}; accepted: a torch.Tensor")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name} has layout {layout}; accepted: a dense (strided) tensor")
    if dtypes is not None and value.dtype not in dtypes:
        accepted = ", ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{name} has dtype {dtype_name(value.dtype)}; accepted: {accepted}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted: {ndim} dimensions")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; accepted: {device}")
    if torch.compiler.is_compiling():
        return value
    if value.is_neg():
        raise ValueError(
            f"{name} has its negative bit set, like x.conj().imag: its bytes do not have the sign of its values; "
            f"accepted: {name}.resolve_neg()"
        )
    if type(value) in _WITH_MEMORY:  # not fake tensors, which are meta tensors that report another device
        if value.is_meta:
            raise ValueError(f"{name} is on meta, which holds no values; accepted: a tensor on a GPU or a CPU")
        _check_reach(value, name)
    return value


def extent(tensor: Tensor) -> int:
    """Count the elements from a tensor's first to its last in memory, both included; 0 for an empty tensor."""
    if tensor.is_contiguous():  # the common case, in a quarter of the time
        return tensor.numel()
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may have the same address."""
    if tensor.is_contiguous():
        return False
    last_offset = 0  # of the axes with smaller strides
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1 and stride <= last_offset:
            return True
        last_offset += (size - 1) * stride
    return False


def share_elements(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors share a byte. The result is exact, also for views whose elements interleave.

    A search of more than 5000 steps, which no regular view needs, ends with True.
    """
    spans = [(t.data_ptr(), t.data_ptr() + extent(t) * t.element_size()) for t in (first, second)]
    if not (spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]):
        return False
    # An address is a base plus a sum of strides times indices. The tensors share a byte if an address in `first` minus
    # an address in `second` can be 0, each index being in its range. Axes of equal strides form one term.
    ranges: dict[int, list[int]] = {1: [1 - second.element_size(), first.element_size() - 1]}  # bytes in an element
    for tensor, sign in ((first, 1), (second, -1)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size > 1 and stride:
                bounds = ranges.setdefault(stride * tensor.element_size(), [0, 0])
                bounds[sign > 0] += sign * (size - 1)
    terms = sorted(((stride, low, high) for stride, (low, high) in ranges.items()), reverse=True)
    steps = 0

    def can_sum_to(target: int, term: int) -> bool:
        """Whether the terms from number `term` on can sum to `target`."""
        nonlocal steps
        steps += 1
        if term == len(terms) or steps > 5000:
            return target == 0 or steps > 5000
        stride, low, high = terms[term]
        smallest = sum(other[0] * other[1] for other in terms[term + 1 :])
        largest = sum(other[0] * other[2] for other in terms[term + 1 :])
        begin, end = max(low, -(-(target - largest) // stride)), min(high, (target - smallest) // stride)
        return any(can_sum_to(target - stride * index, term + 1) for index in range(begin, end + 1))

    return can_sum_to(spans[1][0] - spans[0][0], 0)


def check_inside_storage(tensor: Tensor, name: str) -> None:
    """Raise ValueError if a tensor's strides reach past its storage, which can be resized after a view was made."""
    if torch.compiler.is_compiling() or type(tensor) not in _WITH_MEMORY or tensor.is_meta:
        return  # fake tensors have no memory
    _check_reach(tensor, name)


_WITH_MEMORY = (Tensor, torch.nn.Parameter)


def _check_reach(tensor: Tensor, name: str) -> None:
    needed = (tensor.storage_offset() + extent(tensor)) * tensor.element_size() if tensor.numel() else 0
    storage_bytes = tensor.untyped_storage().nbytes()
    if needed > storage_bytes:
        raise ValueError(
            f"{name} with shape {list(tensor.shape)}, strides {list(tensor.stride())} and offset "
            f"{tensor.storage_offset()} reaches byte {needed} of its memory, which has {storage_bytes}; accepted: "
            "strides that stay inside the tensor's memory"
        )


def check_int(value: object, name: str, *, minimum: int = 0, maximum: int = 2**31 - 1) -> int:
    """Return a Python or NumPy integer as an int in [minimum, maximum]. A bool is rejected."""
    if isinstance(value, (bool, Tensor)):
        raise TypeError(f"{name} is {described(value)}; accepted: an int")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {described(value)}; accepted: an int") from None
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} is {shown(number)}; accepted: {minimum} to {maximum}")
    return number


def check_window(value: object, name: str = "window") -> int | None:
    """Return a window: how many of the newest keys a query sees, its own included; None means no window.

    Engines write "no window" as 0 or -1; the error names None instead.

    Raises:
        TypeError, ValueError: `value` is neither None nor an int of 1 or more.
    """
    if value is None:
        return None
    try:
        return check_int(value, name, minimum=1)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, or None for no window") from None


def as_float(value: object) -> float | None:
    """Convert a real Python or NumPy number to float, infinite if it is too large; return None for other values."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, operator.gt(value, 0) - 0.5)


def check_positive(value: object, name: str, accepted: str = "a number") -> float:
    """Return a Python or NumPy number as a finite float above 0 that FP32 can represent.

    Args:
        value: the argument.
        name: the argument's name, for errors.
        accepted: the accepted types, for the TypeError.

    Raises:
        TypeError: `value` is not a number; a bool is not accepted as one.
        ValueError: `value` is not finite and above 0, or FP32 rounds it to infinity or below its smallest normal
            number.
    """
    number = as_float(value)
    if number is None:
        raise TypeError(f"{name} is {described(value)}; accepted: {accepted}")
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {_number(value)}; accepted: finite values above 0")
    if not torch.finfo(torch.float32).smallest_normal <= number <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} is {_number(value)}; accepted: values that FP32 can hold")
    return number


def _number(value: object) -> str:
    """Format a number for an error message: a NumPy number without the name of its type."""
    return shown(value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value)


def check_choice(value: object, name: str, accepted: Sequence[str]) -> str:
    """Return `value` if it is one of the accepted strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {described(value)}; accepted: {', '.join(accepted)}")
    if value not in accepted:
        raise ValueError(f"{name} is {shown(value)}; accepted: {', '.join(accepted)}")
    return value
