"""What launchers share: where a kernel runs, how far its offsets reach, and how wide it may load."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor


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
