"""Argument checks that every public function shares; each error names the argument, what came and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def described(value: object) -> str:
    """A value as an error shows it: its type and the start of its repr; of a tensor its shape, because to print its
    values is to wait for a GPU, or to read past its memory."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__} of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"{type(value).__name__} with tensors"
    return f"{type(value).__name__} {value!r:.60}"


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
        ValueError: its rank, device or layout is not accepted, or its strides reach past its storage.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {described(value)}; accepted: a torch.Tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; accepted: a dense (strided) tensor")
    if dtypes is not None and value.dtype not in dtypes:
        accepted = ", ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{name} has dtype {dtype_name(value.dtype)}; accepted: {accepted}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted: {ndim} dimensions")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; accepted: {device}")
    check_inside_storage(value, name)
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
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
        return  # fake tensors have no memory to leave
    needed = (tensor.storage_offset() + extent(tensor)) * tensor.element_size() if tensor.numel() else 0
    held = tensor.untyped_storage().nbytes()
    if needed > held:
        raise ValueError(
            f"{name} with shape {list(tensor.shape)}, strides {list(tensor.stride())} and offset "
            f"{tensor.storage_offset()} reaches byte {needed} of its memory, which has {held}; accepted: strides "
            "that stay inside the tensor's memory"
        )


def check_int(value: object, name: str, *, minimum: int = 0, maximum: int = 2**31 - 1) -> int:
    """Return `value` as an int in [minimum, maximum]; a bool is not a number here."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name} is {described(value)}; accepted: an int")
    number = int(value.__index__())
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} is {number}; accepted: {minimum} to {maximum}")
    return number


def check_choice(value: object, name: str, accepted: Sequence[str]) -> str:
    """Return `value` if it is one of the accepted words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {described(value)}; accepted: {', '.join(accepted)}")
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    return value
