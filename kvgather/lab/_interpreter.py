"""Hooks into Triton's interpreter that report each launch with its arguments, and each access before it is executed.

Triton has no interface for this. A trace therefore wraps four of Triton's internals while it runs: `GridExecutor`
(launches), `_implicit_cvt` (conversion of a tensor to a pointer), `InterpreterBuilder` (accesses) and, in processes
that compile kernels, `JITFunction`. Tested with triton 3.6 to 3.9.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

TAG_SHIFT = 56  # user addresses are below 2^56, which leaves the top byte for the number of the argument
BIAS = 1 << 55  # an address below 0 would borrow from the tag; the bias keeps every address positive
ADDRESS_MASK = np.uint64((1 << TAG_SHIFT) - 1)
TESTED_VERSIONS = "3.6 to 3.9"


class TraceError(ValueError):
    """Triton's interpreter cannot be imported, or lacks functions that the hooks replace; the message says why."""


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        number: index of the launch in the trace, from 0.
        kernel: the kernel's name.
        arguments: the kernel's tensor arguments by name, as the interpreter uses them (a CPU copy of a GPU tensor).
        grid: the grid, with as many axes as the caller specified.
        program: index of the current program along each axis.
    """

    number: int
    kernel: str
    arguments: dict[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    program: tuple[int, ...] = ()

    def tag(self, tensor: Tensor) -> int:
        """The tag for the top byte of a tensor's pointer: the argument's number from 1, or 0 for any other tensor."""
        for number, argument in enumerate(self.arguments.values(), start=1):
            if argument is tensor:
                return number
        return 0

    def locate(self, address: NDArray[np.uint64]) -> tuple[str, NDArray[np.int64]]:
        """The argument that tagged addresses were computed from, and byte offsets from the argument's first element."""
        tags = address >> np.uint64(TAG_SHIFT)
        tag = int(tags.flat[0]) if tags.size else 0
        if not 1 <= tag <= len(self.arguments):
            return "", address.view(np.int64)
        name, tensor = list(self.arguments.items())[tag - 1]
        start = np.uint64((tag << TAG_SHIFT) + BIAS + tensor.data_ptr())
        return name, (address - start).view(np.int64)


Record = Callable[[Launch, str, NDArray[np.uint64], int, NDArray[np.bool_], tuple[str, int]], NDArray[np.bool_]]


@dataclass
class Recorder:
    """Receives launches and accesses.

    Attributes:
        launches: the launches so far; the hooks append each one.
        record: called before each access with launch, kind, tagged addresses, width in bytes, mask and
            (file, line); returns the lanes to skip.
        current: the launch that is running.
    """

    launches: list[Launch]
    record: Record
    current: Launch | None = None


def _import_interpreter() -> tuple[Any, Any]:
    """The modules `triton` and `triton.runtime.interpreter`, checked to have every function that `hooked` wraps."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError as error:
        raise TraceError(f"a trace needs triton and its interpreter, which cannot be imported here: {error}") from error
    builder = getattr(interpreter, "InterpreterBuilder", None)
    parameters = {
        "create_masked_load": "ptrs mask other",
        "create_masked_store": "ptrs value mask",
        "create_atomic_rmw": "rmwOp ptr val mask",
        "create_atomic_cas": "ptr cmp val",
    }
    missing = [
        f"InterpreterBuilder.{name}({', '.join(arguments.split())}, …)"
        for name, arguments in parameters.items()
        if list(inspect.signature(getattr(builder, name, lambda: None)).parameters)[1:][: len(arguments.split())]
        != arguments.split()
    ]
    missing += [
        name for name in ("_implicit_cvt", "TensorHandle", "InterpretedFunction") if not hasattr(interpreter, name)
    ]
    if not hasattr(getattr(interpreter, "GridExecutor", None), "_init_args_hst"):
        missing.append("GridExecutor._init_args_hst")
    if missing:
        raise TraceError(
            f"cannot hook the interpreter of triton {triton.__version__}: it has no {', no '.join(missing)}; "
            f"accepted: triton {TESTED_VERSIONS}"
        )
    return triton, interpreter


Replacement = tuple[Any, str, Any]
"""An object, the name of an attribute, and the value that it has while a trace runs."""


@contextmanager
def hooked(recorder: Recorder) -> Iterator[None]:
    """Context manager that wraps the interpreter: every kernel launched in its body reports to `recorder`."""
    triton, interpreter = _import_interpreter()
    package = os.path.dirname(os.path.abspath(triton.__file__)) + os.sep
    replacements = [
        *_launch_hooks(recorder, interpreter),
        *_access_hooks(recorder, interpreter, package),
        *_interpret_compiled(triton, interpreter),
    ]
    with ExitStack() as stack:
        for owner, name, new in replacements:
            stack.enter_context(patch.object(owner, name, new))
        yield


def _launch_hooks(recorder: Recorder, interpreter: Any) -> list[Replacement]:
    """Replacements that record each launch with its tensors, and tag the addresses that it passes to the kernel."""
    executor = interpreter.GridExecutor
    call, init_args, convert = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt

    def new_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launch = Launch(len(recorder.launches), self.fn.__name__)
        caller_grid = self.grid

        def grid(meta: Any) -> tuple[int, ...]:
            launch.grid = tuple(caller_grid(meta) if callable(caller_grid) else caller_grid)
            return launch.grid

        self.grid = grid
        recorder.launches.append(launch)
        recorder.current = launch
        try:
            return call(self, *args, **kwargs)
        finally:
            recorder.current = None

    def new_init_args(self: Any, args: Any, kwargs: Any) -> Any:
        on_host, kwargs_on_host = init_args(self, args, kwargs)
        if recorder.current is not None:
            bound = inspect.getcallargs(self.fn, *on_host, **kwargs_on_host)
            recorder.current.arguments = dict(_tensors(bound))
        return on_host, kwargs_on_host

    def new_convert(value: Any) -> Any:
        result = convert(value)
        launch = recorder.current
        if launch is not None and hasattr(value, "data_ptr"):
            tag = launch.tag(_unwrap(value))
            if tag:
                result.handle.data = result.handle.data + np.uint64((tag << TAG_SHIFT) + BIAS)
        return result

    return [
        (executor, "__call__", new_call),
        (executor, "_init_args_hst", new_init_args),
        (interpreter, "_implicit_cvt", new_convert),
    ]


def _access_hooks(recorder: Recorder, interpreter: Any, package: str) -> list[Replacement]:
    """Replacements that record each load, store and atomic; `package` is Triton's folder."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def check(self: Any, kind: str, pointer: Any, mask: Any) -> tuple[Any, NDArray[np.bool_]]:
        """The pointer without its tag, and the lanes to execute."""
        tagged = np.asarray(pointer.data, dtype=np.uint64)
        lanes = np.broadcast_to(np.asarray(_data(mask, handle), dtype=bool), tagged.shape)
        launch = recorder.current
        if launch is None:
            return pointer, lanes
        launch.program = tuple(int(i) for i in self.grid_idx[: len(launch.grid)])
        width = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        skip = recorder.record(launch, kind, tagged, width, lanes.copy(), _source(package))
        bare = np.where(tagged >> np.uint64(TAG_SHIFT) == 0, tagged, (tagged & ADDRESS_MASK) - np.uint64(BIAS))
        return handle(bare, pointer.dtype), lanes & ~skip

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        bare, lanes = check(self, "load", ptrs, mask)
        result = load(self, bare, _mask(handle, interpreter, lanes), other, *rest, **named)
        skipped = np.asarray(_data(mask, handle), dtype=bool) & ~lanes
        if skipped.any():  # `other` applies to lanes that the kernel's own mask disables; a skipped lane gives 0
            result.data = np.where(skipped, np.zeros_like(result.data), result.data)
        return result

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        bare, lanes = check(self, "store", ptrs, mask)
        return store(self, bare, value, _mask(handle, interpreter, lanes), *rest, **named)

    def atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        bare, lanes = check(self, "atomic", ptr, mask)
        return rmw(self, op, bare, val, _mask(handle, interpreter, lanes), *rest, **named)

    def atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, *rest: Any, **named: Any) -> Any:
        bare, lanes = check(self, "atomic", ptr, np.ones(ptr.data.shape, bool))
        if lanes.all():
            return cas(self, bare, cmp, val, *rest, **named)
        return handle(np.zeros_like(cmp.data), cmp.dtype.scalar)  # a CAS has no mask: one skipped lane skips all

    return [
        (builder, "create_masked_load", masked_load),
        (builder, "create_masked_store", masked_store),
        (builder, "create_atomic_rmw", atomic_rmw),
        (builder, "create_atomic_cas", atomic_cas),
    ]


def _interpret_compiled(triton: Any, interpreter: Any) -> list[Replacement]:
    """Replacements that run kernels decorated for compilation in the interpreter."""

    def interpreted(self: Any) -> Any:
        return interpreter.InterpretedFunction(self.fn)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return interpreted(self).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = interpreted(self)
        scope = interpreter._patch_lang(self.fn)  # without a scope to restore, the language would stay patched
        try:
            return function.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    jit = triton.runtime.jit.JITFunction
    return [(jit, "run", run), (jit, "__call__", call)]


def _tensors(bound: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a launch's arguments, with names; `x[0]` is the first item of a tuple `x`."""
    for name, value in bound.items():
        if isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": item for i, item in enumerate(value)})
        elif hasattr(value, "data_ptr"):
            yield name, _unwrap(value)
        elif hasattr(value, "base") and hasattr(value.base, "data_ptr"):
            yield name, _unwrap(value.base)


def _unwrap(value: Any) -> Any:
    return value if isinstance(value, Tensor) else getattr(value, "base", value)


def _data(mask: Any, handle: Any) -> Any:
    return mask.data if isinstance(mask, handle) else mask


def _mask(handle: Any, interpreter: Any, lanes: NDArray[np.bool_]) -> Any:
    return handle(lanes, interpreter.tl.int1)


def _source(package: str) -> tuple[str, int]:
    """File and line of the running kernel: the innermost frame outside this file and outside triton."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(package):
            return name, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "", 0
