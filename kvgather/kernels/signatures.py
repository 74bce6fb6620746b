"""Signatures of tensors: the properties that checks and compiled kernels depend on."""

from __future__ import annotations

from torch import Tensor

Pointers = tuple[Tensor | float, ...]
"""A kernel's pointer arguments; a number where the kernel takes a number in place of a pointer."""
MOST = 2**31 - 1
"""Largest run-time number of a prepared launch; Triton gives a larger one another type."""


def signature(tensor: Tensor) -> tuple[object, ...]:
    """Return all properties of a tensor that a check or a compiled kernel may depend on.

    Tensors with equal signatures pass the same checks and fit the same compiled kernel. Of the address only the
    alignment is included: Triton compiles separate kernels for addresses that are multiples of 16 and for others.

    Raises:
        AttributeError, RuntimeError: `tensor` is not a tensor, or has no memory; `check_tensor` raises an error that
            names the argument.
    """
    return (
        type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() & 15,
        tensor.is_neg(), tensor.storage_offset(), tensor.untyped_storage().nbytes(),
    )  # fmt: skip


def inside(tensor: Tensor, last: int) -> bool:
    """Whether the element at offset `last` from the tensor's first is inside its storage; −1 means no element."""
    end = (tensor.storage_offset() + last + 1) * tensor.element_size() if last >= 0 else 0
    return end <= tensor.untyped_storage().nbytes()


def row_reach(tensor: Tensor) -> int:
    """Count the elements from the first to the last of one index of the first axis, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def offset_lanes(batch: int) -> int:
    """Return how many offsets a program reads at a time: 32, one warp, if that covers all batch + 1, else 256."""
    return 32 if batch < 32 else 256
