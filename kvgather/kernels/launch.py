"""What launchers share: where a kernel runs, how far its offsets reach, and how wide it may load."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..formats.layout import PoolStrides, Which


def inner_extent(tensor: Tensor) -> int:
    """The largest offset inside the first axis, in elements."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


@functools.cache
def _mend_interpreter() -> None:
    """Let triton 3.6's interpreter take a number of its own as a loop's end, as 3.7's does; NumPy 2.4 ended that."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or not triton.__version__.startswith("3.6."):
        return

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = mended


@contextlib.contextmanager
def launching(pool: Tensor, interpreted: bool) -> Iterator[None]:
    """The pool's GPU is the current one; in the interpreter NumPy overflows to infinity in silence, as a GPU does."""
    if interpreted:
        import warnings

        import numpy as np

        _mend_interpreter()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # a maximum passes NaN by, in silence too
            yield
    else:
        with torch.cuda.device(pool.device):
            yield


def granule(strides: Iterable[int], itemsize: int) -> int:
    """What strides are divided by to say that 16 bytes of elements may move at once; 1 if Triton sees that itself.

    It looks at each number it is given for multiples of 16, and at no others: 8 of SHUFFLE's bfloat16 are 16 bytes too.
    """
    common = math.gcd(16, *strides)
    return 1 if common == 16 else math.gcd(16 // itemsize, common)


@dataclass(frozen=True)
class LoadStrides:
    """A pool's strides as a kernel takes them: of blocks, heads and groups in units of `align` elements.

    Attributes:
        strides: block, head, slot group, slot, dim group, dim.
        align: what the kernel multiplies them by again.
        extent: the largest offset inside a block, in elements.
        slots_per_group, dims_per_group: as in `PoolStrides`.
    """

    strides: tuple[int, ...]
    align: int
    extent: int
    slots_per_group: int
    dims_per_group: int

    @classmethod
    def of(cls, pool: Tensor, layout: str, which: Which) -> LoadStrides:
        s = PoolStrides.of(pool, layout, which)
        grouped = layout == "SHUFFLE"  # elsewhere a group of dims is one element, and its stride is 1
        align = granule((s.block, s.head, s.slot_group, s.dim_group if grouped else 0), pool.element_size())
        dim_group = s.dim_group // align if grouped else s.dim_group
        strides = (s.block // align, s.head // align, s.slot_group // align, s.slot, dim_group, s.dim)
        return cls(strides, align, inner_extent(pool), s.slots_per_group, s.dims_per_group)
