"""Hooks into Triton's interpreter that report each launch with its arguments, and each access before it is executed.

Triton has no interface for this. While a trace runs, this module therefore wraps internals of Triton: `GridExecutor`
(launches), `_implicit_cvt` (conversion of a tensor to a pointer), `InterpreterBuilder` (accesses), `Autotuner` and, in
processes that compile kernels, `JITFunction`. Tested with triton 3.6 to 3.9.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from ._checked import TraceError, import_interpreter
from ._launch import Launch, Recorder, by_tag, source, tagged, tensors, untagged, unwrap
from ._unlike_gpu import InterpreterWarning, Replacement, autotune_hooks, dot_hooks, warn_of_arguments


@dataclass
class _Hooks:
    """The hooks of this process: who receives accesses, and how to remove the hooks.

    Attributes:
        recorders: of the active traces, the outermost first.
        running: the launch that is running, once for each recorder; the first one is used for tags.
        undo: removes the hooks.
        package: Triton's folder.
        thread: the thread whose traces are active.
    """

    recorders: list[Recorder] = field(default_factory=list)
    running: list[Launch] = field(default_factory=list)
    undo: ExitStack = field(default_factory=ExitStack)
    package: str = ""
    thread: int = 0

    def note(self, text: str) -> bool:
        """Add a sentence to the notes of the active traces; returns whether one of them did not have it."""
        new = [recorder for recorder in self.recorders if text not in recorder.notes]
        for recorder in new:
            recorder.notes.append(text)
        return bool(new)

    def warn(self, text: str) -> None:
        """Warn at the line of the kernel, or of the launch if the kernel does not run yet; once for each trace."""
        if self.note(text):
            file, line = source(self.package)
            warnings.warn_explicit(text, InterpreterWarning, file, line)


_hooks = _Hooks()


@contextmanager
def hooked(recorder: Recorder) -> Iterator[None]:
    """Context manager in whose body every kernel launch reports to `recorder`, and to those of enclosing bodies."""
    if _hooks.recorders and _hooks.thread != threading.get_ident():
        raise TraceError("a trace is active in another thread; accepted: one thread that traces at a time")
    if not _hooks.recorders:
        _install()
    _hooks.recorders.append(recorder)
    try:
        yield
    finally:
        _hooks.recorders.remove(recorder)
        if not _hooks.recorders:
            _hooks.undo.close()


def launching() -> bool:
    """Whether a traced launch is running."""
    return bool(_hooks.running)


def _install() -> None:
    triton, interpreter = import_interpreter()
    _hooks.package = os.path.dirname(os.path.abspath(triton.__file__)) + os.sep
    replacements = [
        *_launch_hooks(interpreter),
        *_access_hooks(interpreter),
        *autotune_hooks(triton, _hooks.note),
        *dot_hooks(interpreter, _hooks.warn),
        *_interpret_compiled(triton, interpreter),
    ]
    with ExitStack() as stack:
        for owner, name, new in replacements:
            stack.enter_context(patch.object(owner, name, new))
        _hooks.undo = stack.pop_all()
    _hooks.thread = threading.get_ident()


def _launch_hooks(interpreter: Any) -> list[Replacement]:
    """Replacements that record each launch with its tensors, and tag the addresses that it passes to the kernel."""
    executor = interpreter.GridExecutor
    call, init_args, convert = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt

    def new_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches = [Launch(len(recorder.launches), self.fn.__name__) for recorder in _hooks.recorders]
        caller_grid = self.grid

        def grid(meta: Any) -> tuple[int, ...]:
            chosen = tuple(caller_grid(meta) if callable(caller_grid) else caller_grid)
            for launch in launches:
                launch.grid = chosen
            return chosen

        self.grid = grid
        for recorder, launch in zip(_hooks.recorders, launches, strict=True):
            recorder.launches.append(launch)
        _hooks.running = launches
        try:
            return call(self, *args, **kwargs)
        finally:
            _hooks.running = []

    def new_init_args(self: Any, args: Any, kwargs: Any) -> Any:
        on_host, kwargs_on_host = init_args(self, args, kwargs)
        arguments = dict(tensors(inspect.getcallargs(self.fn, *on_host, **kwargs_on_host)))
        originals = dict(tensors(inspect.getcallargs(self.fn, *args, **kwargs)))
        for launch in _hooks.running:
            launch.arguments, launch.originals = arguments, originals
        warn_of_arguments(self.fn.__name__, arguments, _hooks.warn)
        return on_host, kwargs_on_host

    def new_convert(value: Any) -> Any:
        result = convert(value)
        if _hooks.running and hasattr(value, "data_ptr"):
            tag = _hooks.running[0].tag(unwrap(value))
            if tag:
                result.handle.data = result.handle.data + tagged(tag)
        return result

    return [
        (executor, "__call__", new_call),
        (executor, "_init_args_hst", new_init_args),
        (interpreter, "_implicit_cvt", new_convert),
    ]


def _access_hooks(interpreter: Any) -> list[Replacement]:
    """Replacements that record each load, store and atomic."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def check(self: Any, kind: str, pointer: Any, mask: Any) -> tuple[Any, NDArray[np.bool_]]:
        """The pointer without its tag, and the lanes to execute."""
        address = np.asarray(pointer.data, dtype=np.uint64)
        lanes = np.broadcast_to(np.asarray(_data(mask, handle), dtype=bool), address.shape)
        if not _hooks.running:
            return pointer, lanes
        width = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        where = source(_hooks.package)
        skip = np.zeros(lanes.shape, bool)
        for recorder, launch in zip(_hooks.recorders, _hooks.running, strict=True):
            launch.program = tuple(int(i) for i in self.grid_idx[: len(launch.grid)])
            for tag, part in by_tag(address, lanes):
                skip |= recorder.record(launch, kind, tag, address, width, part, where)
        return handle(untagged(address), pointer.dtype), lanes & ~skip

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


def _data(mask: Any, handle: Any) -> Any:
    return mask.data if isinstance(mask, handle) else mask


def _mask(handle: Any, interpreter: Any, lanes: NDArray[np.bool_]) -> Any:
    return handle(lanes, interpreter.tl.int1)
