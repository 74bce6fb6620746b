"""What the code of calls may use, as text, so that it can be printed with a call."""

from __future__ import annotations

PREAMBLE = """
import contextlib, decimal, enum, fractions, functools, itertools
import numpy as np
import torch
import kvgather as kg
from kvgather.lab.fence import fenced
from kvgather.lab.trace import trace
from kvgather.parallel import Share

def source(seed):
    return torch.Generator().manual_seed(seed)

def codes(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=source(seed), dtype=torch.uint8)

def normal(*shape, seed=0):
    return torch.randn(shape, generator=source(seed))

def scales(*shape, seed=0):
    return 0.25 + torch.rand(shape, generator=source(seed))

def sparkled(x, seed=0):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, 3e38, 500.0, -1e-9])
    where = torch.rand(x.shape, generator=source(seed)) < 0.2
    return torch.where(where, special[torch.randint(0, 9, x.shape, generator=source(seed + 1))].to(x.dtype), x)

def negative(x):
    return torch.complex(torch.zeros(x.shape), -x).conj().imag

def without_memory(x):
    x = x.clone()
    x.untyped_storage().resize_(max(0, x.untyped_storage().nbytes() - 1))
    return x

def over(x, shape, dtype):
    begin, needed = x.storage_offset() * x.element_size(), int(np.prod(shape)) * dtype.itemsize
    if not 0 < needed <= x.untyped_storage().nbytes() - begin or begin % dtype.itemsize or not x.numel():
        return 0
    return torch.empty(0, dtype=dtype).set_(x.untyped_storage(), begin // dtype.itemsize, shape)

class Named(torch.Tensor):
    pass

def of_subclass(x):
    return x.as_subclass(Named)

@contextlib.contextmanager
def by_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

def by_kernel(call, **named):
    from unittest.mock import patch
    from kvgather.plan_kernel import plan_records
    from kvgather import plan
    in_torch, triton = plan.records_by_torch, lambda *_: "triton"
    with contextlib.ExitStack() as stack:
        for name in ("gather.compat", "batch.reference", "batch.refused", "attention.merge"):
            stack.enter_context(patch(f"kvgather.{name}.choose_backend", triton))
        by_launch = lambda *given: plan_records(*given) if given[-1] else in_torch(*given)
        stack.enter_context(patch.object(plan, "records_by_torch", by_launch))
        return call(**named)

def traced(call, strict, **named):
    with trace(strict=strict) as found:
        result = call(**named)
    assert not found.violations, found.report()
    return result

def shrunk(cache):
    cache.key_cache.untyped_storage().resize_(0)
    return cache
"""
"""What the code of calls may use; `tests.fuzz.snippet` prints the part of it that a call needs."""
SURROUNDINGS = (
    "by_default(torch.bfloat16)", "by_default(torch.float64)", "torch.device('meta')", "torch.inference_mode()",
    "torch.autocast('cpu', dtype=torch.bfloat16)", "torch.no_grad()",
)  # fmt: skip
"""Of a call; they change nothing."""
