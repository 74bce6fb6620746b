"""Where a traced launch differs from one on a GPU: autotuning, and what Triton's interpreter computes wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Replacement = tuple[Any, str, Any]
"""An object, the name of an attribute, and the value that it has while a trace runs."""
Note = Callable[[str], object]
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class InterpreterWarning(UserWarning):
    """Triton's interpreter computes a traced kernel's results differently from a GPU; the accesses are right."""


def autotune_hooks(triton: Any, note: Note) -> list[Replacement]:
    """Replacements that run an autotuned kernel with its first configuration, because its measurements need a GPU."""
    autotuner = triton.runtime.autotuner.Autotuner
    original = autotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(self.configs) <= 1:
            return original(self, *args, **kwargs)
        configs = every = self.configs
        if self.early_config_prune is not None:  # may reject the first one for these arguments
            configs = self.early_config_prune(configs, dict(zip(self.arg_names, args, strict=False)), **kwargs)
        name = getattr(self.base_fn, "__name__", "the kernel")
        note(f"{name}() is autotuned; it ran with the first of {len(configs)} configurations: {configs[0]}")
        self.configs = configs[:1]
        try:
            return original(self, *args, **kwargs)
        finally:
            self.configs = every

    return [(autotuner, "run", run)]


def dot_hooks(interpreter: Any, warn: Note) -> list[Replacement]:
    """Replacements that warn of a BF16 `tl.dot` where the interpreter multiplies bit patterns."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any, **named: Any) -> Any:
        tl = interpreter.tl
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar) and not _multiplies_bfloat16(interpreter, original):
            warn(
                "tl.dot of bfloat16 is wrong in Triton's interpreter, which multiplies the bit patterns; results may "
                "be wrong by a factor of 1e10; give the kernel float32 or float16 while you check its results"
            )
        return original(self, a, b, d, *rest, **named)

    return [(builder, "create_dot", create_dot)]


def _multiplies_bfloat16(interpreter: Any, create_dot: Any) -> bool:
    """Whether `tl.dot` gives 1 · 1 = 1 in BF16, whose 1 has the bits 0x3F80."""
    tl, handle = interpreter.tl, interpreter.TensorHandle
    one, zero = (
        handle(np.full((1, 1), 0x3F80, np.uint16), tl.bfloat16),
        handle(np.zeros((1, 1), np.float32), tl.float32),
    )
    return bool(create_dot(interpreter.InterpreterBuilder(), one, one, zero, None, 0).data[0, 0] == 1)


def warn_of_arguments(kernel: str, arguments: dict[str, Tensor], warn: Note) -> None:
    """Warn of arguments whose dtype the interpreter cannot load, or decodes wrongly."""
    for name, tensor in arguments.items():
        if tensor.dtype in FNUZ:
            dtype = str(tensor.dtype).removeprefix("torch.")
            warn(
                f"{name} of {kernel}() has dtype {dtype}, which Triton's interpreter cannot load (3.6 to 3.8) or whose "
                f"NaN, 0x80, it reads as 0 (3.9); pass {name}.view(torch.uint8) and decode it in the kernel"
            )
