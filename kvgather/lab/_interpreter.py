"""Hooks into Triton's interpreter: who is launched with what, and each access before it happens.

Triton has no interface for this, so four of its internals are wrapped, and only while a trace lasts:
`GridExecutor` (a launch), `_implicit_cvt` (a tensor becomes a pointer), `InterpreterBuilder` (an access)
and, where kernels are compiled, `JITFunction`. Known to fit triton 3.6 to 3.9.
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

TAG_SHIFT = 56  # user addresses end below 2^56, so the top byte is free for the argument's number
BIAS = 1 << 55  # keeps an address that went below 0 from borrowing from the tag
ADDRESS_MASK = np.uint64((1 << TAG_SHIFT) - 1)
KNOWN = "3.6 to 3.9"


class TraceError(ValueError):
    """Triton's interpreter is missing here, or is not one that can be hooked; the message says which."""


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        number: which launch of the trace it is, from 0.
        kernel: the kernel's name.
        arguments: its tensor arguments by name, as the interpreter sees them (copies on the CPU of GPU
            tensors).
        grid: the grid, as many axes as were given.
        program: the program that is running, its index along each axis.
    """

    number: int
    kernel: str
    arguments: dict[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    program: tuple[int, ...] = ()

    def tag(self, tensor: Tensor) -> int:
        """The number to put into the top byte of this tensor's pointer: 1 for the first, 0 for an unknown
        one."""
        for number, argument in enumerate(self.arguments.values(), start=1):
            if argument is tensor:
                return number
        return 0

    def locate(self, address: NDArray[np.uint64]) -> tuple[str, NDArray[np.int64]]:
        """The argument that tagged addresses were computed from, and their byte offsets from its first
        element."""
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
    """Where launches and accesses go.

    Attributes:
        launches: filled with each launch.
        record: called before each access with launch, kind, tagged addresses, width in bytes, mask and
            (file, line); returns the lanes that must not be carried out.
    """

    launches: list[Launch]
    record: Record
    current: Launch | None = None


def _import_interpreter() -> tuple[Any, Any]:
    """The modules `triton` and `triton.runtime.interpreter`, with everything there that is about to be
    wrapped."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError as error:
        raise TraceError(f"a trace needs triton and its interpreter, which cannot be imported here: {error}") from error
    builder = getattr(interpreter, "InterpreterBuilder", None)
    wanted = {
        "create_masked_load": "ptrs mask other",
        "create_masked_store": "ptrs value mask",
        "create_atomic_rmw": "rmwOp ptr val mask",
        "create_atomic_cas": "ptr cmp val",
    }
    missing = [
        f"InterpreterBuilder.{name}({', '.join(arguments.split())}, …)"
        for name, arguments in wanted.items()
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
            f"accepted: triton {KNOWN}"
        )
    return triton, interpreter


Replacement = tuple[Any, str, Any]
"""An object, the name of one of its attributes, and the attribute that stands in its place while a trace runs."""


@contextmanager
def hooked(recorder: Recorder) -> Iterator[None]:
    """Wrap the interpreter so that every launch and access inside goes through `recorder`."""
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
        given = self.grid

        def grid(meta: Any) -> tuple[int, ...]:
            launch.grid = tuple(given(meta) if callable(given) else given)
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
    """Replacements that record each load, store and atomic; `package` is triton's folder."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def check(self: Any, kind: str, pointer: Any, mask: Any) -> tuple[Any, NDArray[np.bool_]]:
        """The pointer without its tag, and the lanes that may be carried out."""
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
        if skipped.any():  # the kernel's own `other` is for lanes that it switched off itself
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
        return handle(np.zeros_like(cmp.data), cmp.dtype.scalar)  # it has no mask: all or nothing

    return [
        (builder, "create_masked_load", masked_load),
        (builder, "create_masked_store", masked_store),
        (builder, "create_atomic_rmw", atomic_rmw),
        (builder, "create_atomic_cas", atomic_cas),
    ]


def _interpret_compiled(triton: Any, interpreter: Any) -> list[Replacement]:
    """Replacements that send kernels decorated for compilation through the interpreter."""

    def interpreted(self: Any) -> Any:
        return interpreter.InterpretedFunction(self.fn)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return interpreted(self).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = interpreted(self)
        scope = interpreter._patch_lang(self.fn)  # the interpreter itself would leave the language patched
        try:
            return function.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    jit = triton.runtime.jit.JITFunction
    return [(jit, "run", run), (jit, "__call__", call)]


def _tensors(bound: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Named tensors among a launch's arguments; those in tuples and descriptors get a name made from the
    argument's."""
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
    """File and line of the kernel that is running: the first frame up that is neither here nor in triton."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(package):
            return name, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "", 0
