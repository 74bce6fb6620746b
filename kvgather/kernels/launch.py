"""What launchers share: how a kernel is launched cheaply, how far its offsets reach, and how wide it may load."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from ..formats.layout import PoolStrides, Which
from .signatures import Pointers


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
def launching(tensor: Tensor, interpreted: bool) -> Iterator[None]:
    """The tensor's GPU is the current one; in the interpreter NumPy overflows to infinity in silence, as a GPU does."""
    if interpreted:
        import warnings

        import numpy as np

        _mend_interpreter()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # a maximum passes NaN by, in silence too
            yield
    else:
        with torch.cuda.device(tensor.device):
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


# A kernel that Triton compiled can be run without the search that `kernel[grid](…)` does at each launch, as
# torch.compile's own launches do. Where that was never tried, and while a profiler's hook wants to see launches, the
# plain launch serves.
_RUNS_COMPILED = triton.__version__.startswith("3.6.") and torch.version.hip is None

_HOOKS = triton.knobs.runtime

_PREPARED: dict[object, Any] = {}
Prepared = TypeVar("Prepared")


def prepared_once(kind: object, key: Hashable, prepare: Callable[[], Prepared]) -> Prepared:
    """What `prepare` makes, made at the first call with a key and kept for the others.

    Args:
        kind: what tells callers apart, such as the kernel.
        key: everything that `prepare` looks at.
    """
    found = _PREPARED.get((kind, key))
    if found is None:
        if len(_PREPARED) >= 1024:  # an engine has some dozens; a test suite with every shape there is has more
            _PREPARED.clear()
        found = _PREPARED[kind, key] = prepare()
    return cast(Prepared, found)


class PreparedLaunch:
    """A kernel with everything about its launches that does not change from one to the next.

    The kernel's parameters come in this order: pointers, numbers, strides, constants. What the caller's cache of
    prepared launches is keyed by has to hold the `signature` of each tensor and every constant: the kernel that was
    compiled at the first launch serves all that follow.
    """

    def __init__(
        self,
        kernel: Any,
        views: tuple[torch.dtype | None, ...],
        strides: tuple[Any, ...],
        constants: dict[str, Any],
        interpreted: bool,
    ) -> None:
        """Prepare, and launch nothing.

        Args:
            kernel: decorated with `triton.jit`.
            views: for each pointer the dtype that the kernel is compiled for, None for the tensor's own. FP8 goes as
                uint8, because not every GPU's Triton has every FP8 dtype.
            strides: the values of its stride parameters, tuples or ints.
            constants: its `tl.constexpr` parameters by name, and launch options such as `num_warps`.
            interpreted: whether launches run in Triton's interpreter.
        """
        self._kernel, self._views, self._strides, self._constants = kernel, views, strides, constants
        self._interpreted = interpreted
        self._tail: tuple[Any, ...] = (*strides, *(constants[n] for n in kernel.arg_names if n in constants))
        self._compiled: tuple[Any, ...] | None = None  # from `_launcher_of`
        self._device = -1

    def __call__(
        self, programs: int, tensors: Pointers, addresses: tuple[int | float, ...], numbers: tuple[int, ...]
    ) -> None:
        """Launch; nothing for a grid of 0.

        Args:
            programs: the grid.
            tensors: the pointer arguments, all on one device, the first one a tensor; a number where the kernel takes
                a number there.
            addresses: their `data_ptr()`, or the number.
            numbers: the run-time numbers, ints below 2^31.
        """
        if programs == 0:
            return
        if self.again(programs, addresses, numbers):
            return
        with launching(cast(Tensor, tensors[0]), self._interpreted):
            pairs = zip(tensors, self._views, strict=True)
            loaded = [t.view(view) if view is not None and isinstance(t, Tensor) else t for t, view in pairs]
            compiled = self._kernel[(programs,)](*loaded, *numbers, *self._strides, **self._constants)
            if _RUNS_COMPILED and not self._interpreted and self._compiled is None:
                self._compiled = _launcher_of(compiled)
                self._device = torch.cuda.current_device()

    def again(self, programs: int, addresses: tuple[int | float, ...], numbers: tuple[int, ...]) -> bool:
        """Launch if that takes addresses alone: the kernel is compiled, and for the GPU that is the current one.

        Args:
            programs: the grid, above 0.
            addresses, numbers: as in a call.

        Returns:
            Whether it was launched. A caller whose tensors are parts of one allocation makes views of it only if not.
        """
        hooks = _HOOKS
        if (
            self._compiled is None
            or torch.cuda.current_device() != self._device
            or hooks.launch_enter_hook.calls
            or hooks.launch_exit_hook.calls
        ):
            return False
        launch, stream_of, before, between = self._compiled
        launch(programs, 1, 1, stream_of(self._device), *before, *between, *addresses, *numbers, *self._tail)
        return True


def _launcher_of(compiled: Any) -> tuple[Any, ...]:
    """What runs a compiled kernel, the current stream of a device, and the arguments before the kernel's own.

    Triton's Python around its C launcher looks for scratch memory, which our kernels never need, and takes as long as
    the launch.
    """
    stream_of = triton.runtime.driver.active.get_current_stream
    run, no_hooks = compiled.run, (compiled.packed_metadata, None, None, None)
    if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
        return run, stream_of, (compiled.function,), no_hooks
    flags = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None)
    return run.launch, stream_of, flags, no_hooks
