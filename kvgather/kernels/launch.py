"""Utilities of the launchers: cheap launches, the range of offsets, and the width of loads."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from .signatures import Pointers


def inner_extent(tensor: Tensor) -> int:
    """Return the largest offset within one index of the first axis, in elements."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


@functools.cache
def patch_interpreter() -> None:
    """Make Triton 3.6's interpreter accept one of its scalars as a loop's end, as 3.7's does; NumPy 2.4 broke this."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or not triton.__version__.startswith("3.6."):
        return

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_index


_INTERPRETER = threading.RLock()


@contextlib.contextmanager
def launching(tensor: Tensor, interpreted: bool) -> Iterator[None]:
    """Select the tensor's GPU for a launch. In the interpreter, silence NumPy's floating-point warnings.

    The interpreter replaces parts of Triton's language during a launch, for all threads: one launch at a time.

    Args:
        tensor: an argument of the kernel.
        interpreted: whether the launch runs in Triton's interpreter.
    """
    if interpreted:
        import warnings

        import numpy as np

        patch_interpreter()
        with _INTERPRETER, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # np.nanmax warns; a GPU does not
            yield
    else:
        with torch.cuda.device(tensor.device):
            yield


def granule(strides: Iterable[int], itemsize: int) -> int:
    """Return the divisor of strides that tells Triton to move 16 bytes at once; 1 if Triton detects this itself.

    Triton specializes integer arguments on multiples of 16 only. A stride of 8 bfloat16 elements, which SHUFFLE has, is
    16 bytes as well: the kernel receives the quotient and multiplies it by the divisor, a constant.
    """
    common = math.gcd(16, *strides)
    return 1 if common == 16 else math.gcd(16 // itemsize, common)


# A compiled kernel can be run without the lookup that `kernel[grid](…)` does at each launch; torch.compile launches
# kernels in this way. Untested versions of Triton, and launches that a profiler's hook observes, use `kernel[grid](…)`.
_RUNS_COMPILED = triton.__version__.startswith("3.6.") and torch.version.hip is None

_HOOKS = triton.knobs.runtime

_PREPARED: dict[object, Any] = {}
Prepared = TypeVar("Prepared")


def prepared_once(kind: object, key: Hashable, prepare: Callable[[], Prepared]) -> Prepared:
    """Return the result of `prepare`, which is called once for each key.

    Args:
        kind: distinguishes callers; the kernel, for example.
        key: everything that the result depends on.
        prepare: creates the result.
    """
    prepared = _PREPARED.get((kind, key))
    if prepared is None:
        if len(_PREPARED) >= 1024:  # an engine needs a few dozen; a test suite with all shapes needs more
            _PREPARED.clear()
        prepared = _PREPARED[kind, key] = prepare()
    return cast(Prepared, prepared)


class PreparedLaunch:
    """A kernel with the arguments that all its launches share.

    The kernel's parameters are in this order: pointers, numbers, strides, constants. All launches run the kernel that
    the first one compiled, so the key under which a caller stores the object must include the `signature` of each
    tensor and every constant.
    """

    def __init__(
        self,
        kernel: Any,
        views: tuple[torch.dtype | None, ...],
        strides: tuple[Any, ...],
        constants: dict[str, Any],
        interpreted: bool,
    ) -> None:
        """Prepare the launches of a kernel.

        Args:
            kernel: decorated with `triton.jit`.
            views: for each pointer the dtype to view the tensor as; None for its own. FP8 is passed as uint8, because
                Triton does not support every FP8 dtype on every GPU.
            strides: the values of the stride parameters, tuples or ints.
            constants: the `tl.constexpr` parameters by name, and launch options such as `num_warps`.
            interpreted: whether launches run in Triton's interpreter.
        """
        self._kernel, self._views, self._strides, self._constants = kernel, views, strides, constants
        self._interpreted = interpreted
        self._last_arguments: tuple[Any, ...] = (*strides, *(constants[n] for n in kernel.arg_names if n in constants))
        self._compiled: tuple[Any, ...] | None = None  # from `_launcher_of`
        self._device = -1
        self._only_gpu = False  # then it is always the current one

    def __call__(
        self, programs: int, tensors: Pointers, addresses: tuple[int | float, ...], numbers: tuple[int, ...]
    ) -> None:
        """Launch the kernel, unless the grid is 0.

        Args:
            programs: the grid.
            tensors: the pointer arguments, all on one device; a number where the kernel takes a number in place of a
                pointer, but not in the first position.
            addresses: the `data_ptr()` of each tensor, or the number.
            numbers: the run-time numbers, ints below 2^31.
        """
        if programs == 0:
            return
        if self.again(programs, addresses, numbers):
            return
        with launching(cast(Tensor, tensors[0]), self._interpreted):
            pairs = zip(tensors, self._views, strict=True)
            pointers = [t.view(view) if view is not None and isinstance(t, Tensor) else t for t, view in pairs]
            compiled = self._kernel[(programs,)](*pointers, *numbers, *self._strides, **self._constants)
            if _RUNS_COMPILED and not self._interpreted and self._compiled is None:
                self._compiled = _launcher_of(compiled)
                self._device = torch.cuda.current_device()
                self._only_gpu = torch.cuda.device_count() == 1

    def again(self, programs: int, addresses: tuple[int | float, ...], numbers: tuple[int, ...]) -> bool:
        """Launch from addresses alone, if the kernel is compiled for the current GPU.

        Args:
            programs: the grid, above 0.
            addresses, numbers: as in `__call__`.

        Returns:
            Whether the kernel was launched. If it was, a caller whose tensors are parts of one allocation need not
            create views of it.
        """
        hooks = _HOOKS
        if (
            self._compiled is None
            or not (self._only_gpu or torch.cuda.current_device() == self._device)
            or hooks.launch_enter_hook.calls
            or hooks.launch_exit_hook.calls
        ):
            return False
        run, stream_of, function, metadata = self._compiled
        run(programs, 1, 1, stream_of(self._device), *function, *metadata, *addresses, *numbers, *self._last_arguments)
        return True


def _launcher_of(compiled: Any) -> tuple[Any, ...]:
    """Return the launcher of a compiled kernel, a function of a device's current stream, and the leading arguments.

    Triton's Python wrapper of its C launcher handles scratch memory, which our kernels do not use, and takes as long as
    the launch itself; so the C launcher is called directly if the kernel needs no scratch memory.
    """
    stream_of = triton.runtime.driver.active.get_current_stream
    run, metadata = compiled.run, (compiled.packed_metadata, None, None, None)  # no launch hooks
    if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
        return run, stream_of, (compiled.function,), metadata
    function = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None)
    return run.launch, stream_of, function, metadata
