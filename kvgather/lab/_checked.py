"""Triton and its interpreter, checked to have every internal function that a trace wraps."""

from __future__ import annotations

import inspect
from typing import Any

TESTED_VERSIONS = "3.6 to 3.9"


class TraceError(ValueError):
    """Triton's interpreter cannot be imported or hooked, or another thread is tracing; the message says why."""


def import_interpreter() -> tuple[Any, Any]:
    """The modules `triton` and `triton.runtime.interpreter`, checked to have every function that the hooks wrap."""
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
        "create_dot": "a b d",
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
