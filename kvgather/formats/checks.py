"""Argument checks that every public function shares; each error names the argument, what came and what is accepted."""

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
    """A value as an error shows it: its type and the start of its repr; of a tensor its shape, because to print its
    values is to wait for a GPU, or to read past its memory."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} with a nested layout" if value.is_nested else f"{kind} of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"{kind} with tensors"
    return f"{kind} {shown(value)}"


def shown(value: object) -> str:
    """The start of a value's repr; Python refuses to print integers of more than 4300 digits."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "of too many digits to print"


def resolved(value: Value) -> Value:
    """A tensor with its negative bit resolved, such as `x.conj().imag`; a copy only then, anything else as it is.

    For arguments that are read and small enough to copy. Kernels and views of another dtype read the bytes, which do
    not have the sign; `check_tensor` refuses the bit.
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
    """Return `value` if it is a dense tensor of the wanted rank, dtype and device, inside its own memory.

    Raises:
        TypeError: it is no tensor, or its dtype is not accepted.
        ValueError: its rank, device or layout is not accepted, its strides reach past its storage, it holds no values
            (meta), or its bytes are not its values (the negative bit; see `resolved`).
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
            f"{name} has its negative bit set, as x.conj().imag has, so that its bytes are not its values; "
            f"accepted: {name}.resolve_neg()"
        )
    if type(value) in _WITH_MEMORY:  # fake tensors are meta tensors that say another device
        if value.is_meta:
            raise ValueError(f"{name} is on meta, which holds no values; accepted: a tensor on a GPU or a CPU")
        _check_reach(value, name)
    return value


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last one that a tensor's strides can reach, both counted; 0 if it is empty."""
    if tensor.is_contiguous():  # most are, and this is a quarter of the time
        return tensor.numel()
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may have one address."""
    if tensor.is_contiguous():
        return False
    reached = 0
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1 and stride <= reached:
            return True
        reached += (size - 1) * stride
    return False


def share_elements(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have a byte in common; exact, also where one lies between the other's elements.

    Where that takes more than some thousands of steps to find out, which no regular view does, the answer is True.
    """
    span = [(t.data_ptr(), t.data_ptr() + extent(t) * t.element_size()) for t in (first, second)]
    if not (span[0][0] < span[1][1] and span[1][0] < span[0][1]):
        return False
    # An address is a sum of strides times indices. The two have one in common where
    #   first's address - second's address = 0, each index in its range. Axes of equal strides count as one.
    ranges: dict[int, list[int]] = {1: [1 - second.element_size(), first.element_size() - 1]}  # bytes of an element
    for tensor, sign in ((first, 1), (second, -1)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size > 1 and stride:
                low_high = ranges.setdefault(stride * tensor.element_size(), [0, 0])
                low_high[sign > 0] += sign * (size - 1)
    terms = sorted(((stride, low, high) for stride, (low, high) in ranges.items()), reverse=True)
    steps = 0

    def reaches(target: int, at: int) -> bool:
        """Whether the terms from `at` on can make `target`."""
        nonlocal steps
        steps += 1
        if at == len(terms) or steps > 5000:
            return target == 0 or steps > 5000
        stride, low, high = terms[at]
        least = sum(other[0] * other[1] for other in terms[at + 1 :])
        most = sum(other[0] * other[2] for other in terms[at + 1 :])
        begin, end = max(low, -(-(target - most) // stride)), min(high, (target - least) // stride)
        return any(reaches(target - stride * index, at + 1) for index in range(begin, end + 1))

    return reaches(span[1][0] - span[0][0], 0)


def check_inside_storage(tensor: Tensor, name: str) -> None:
    """Raise ValueError if a tensor's strides reach past its storage (a storage can be shrunk under its views)."""
    if torch.compiler.is_compiling() or type(tensor) not in _WITH_MEMORY or tensor.is_meta:
        return  # fake tensors have no memory to leave
    _check_reach(tensor, name)


_WITH_MEMORY = (Tensor, torch.nn.Parameter)


def _check_reach(tensor: Tensor, name: str) -> None:
    needed = (tensor.storage_offset() + extent(tensor)) * tensor.element_size() if tensor.numel() else 0
    held = tensor.untyped_storage().nbytes()
    if needed > held:
        raise ValueError(
            f"{name} with shape {list(tensor.shape)}, strides {list(tensor.stride())} and offset "
            f"{tensor.storage_offset()} reaches byte {needed} of its memory, which has {held}; accepted: strides "
            "that stay inside the tensor's memory"
        )


def check_int(value: object, name: str, *, minimum: int = 0, maximum: int = 2**31 - 1) -> int:
    """Return `value`, Python's or NumPy's, as an int in [minimum, maximum]; a bool is not a number here."""
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
    """Return a window, the newest keys that a query sees, its own included; None is no window.

    Engines write "no window" as 0 or -1; here the message says what does.

    Raises:
        TypeError, ValueError: neither None nor an int from 1 on.
    """
    if value is None:
        return None
    try:
        return check_int(value, name, minimum=1)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, or None for no window") from None


def as_float(value: object) -> float | None:
    """The float of a real number, Python's or NumPy's, infinite where it is too large; None for anything else."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, operator.gt(value, 0) - 0.5)


def check_positive(value: object, name: str, accepted: str = "a number") -> float:
    """Return `value`, Python's or NumPy's, as a finite float above 0 that FP32 can hold.

    Args:
        value: the argument as given.
        name: the argument's name, for errors.
        accepted: what the argument may be, for the error of anything that is no number.

    Raises:
        TypeError: it is no number; a bool is none here.
        ValueError: it is not finite and above 0, or FP32 rounds it to infinity or below its smallest normal number.
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
    """A number as an error shows it: NumPy's without the name of its type."""
    return shown(value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value)


def check_choice(value: object, name: str, accepted: Sequence[str]) -> str:
    """Return `value` if it is one of the accepted words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {described(value)}; accepted: {', '.join(accepted)}")
    if value not in accepted:
        raise ValueError(f"{name} is {shown(value)}; accepted: {', '.join(accepted)}")
    return value
