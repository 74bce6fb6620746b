"""What two launches must have in common to be one and the same to every check, and to the compiler."""

from __future__ import annotations

from torch import Tensor

Pointers = tuple[Tensor | float, ...]
"""A kernel's pointer arguments; a number where it takes a number in place of a tensor."""
MOST = 2**31 - 1
"""The largest run-time number that a prepared launch passes; a larger one is another type to Triton."""


def signature(tensor: Tensor) -> tuple[object, ...]:
    """Everything about a tensor that a check or a compilation may depend on, except the address itself.

    Two tensors with equal signatures pass the same checks and fit the same compiled kernel: Triton compiles for an
    address that is a multiple of 16 apart from one that is not.

    Raises:
        AttributeError, RuntimeError: it is no tensor, or one without memory; `check_tensor` says so in its own words.
    """
    return (
        type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() & 15,
        tensor.is_neg(), tensor.storage_offset(), tensor.untyped_storage().nbytes(),
    )  # fmt: skip


def inside(tensor: Tensor, last: int) -> bool:
    """Whether the element at `last`, counted from the tensor's first, is inside its memory; −1 is none."""
    end = (tensor.storage_offset() + last + 1) * tensor.element_size() if last >= 0 else 0
    return end <= tensor.untyped_storage().nbytes()


def row_reach(tensor: Tensor) -> int:
    """Elements from the first to the last of one index of the first axis, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def offset_lanes(batch: int) -> int:
    """How many offsets a program reads at a time: one warp's lanes where those hold all batch + 1, else 256."""
    return 32 if batch < 32 else 256
