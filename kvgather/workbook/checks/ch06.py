"""Checks of chapter 06: a guard for the old kernel, the strides of a scale, and a scale that escapes a rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvgather.device import has_gpu
from kvgather.formats.scale import resolve
from kvgather.lab import before_fix
from kvgather.lab.trace import Trace, trace
from kvgather.workbook.checks import Wrong, exercise
from kvgather.workbook.checks.refusal import must_refuse, must_return

BLOCKS, HEADS, PAGE, DIM = 6, 2, 16, 16
BAD_SHAPES = (
    (7,), (HEADS, BLOCKS), (PAGE, HEADS, BLOCKS), (BLOCKS * HEADS * PAGE,), (1, HEADS, 1), (BLOCKS, HEADS, 1),
    (BLOCKS, HEADS, PAGE - 1), (BLOCKS, 1, PAGE), (BLOCKS, HEADS + 1), (BLOCKS, HEADS + 1, PAGE),
)  # fmt: skip


@exercise("06.1", correct="the flag agrees with shape and strides, or the kernel is not called")
def honest_flag(answer: Callable[..., Any]) -> None:
    one, token = torch.ones(1), torch.ones(BLOCKS, HEADS, PAGE)
    must_return(False, answer, one, one.view(1, 1, 1), BLOCKS, HEADS, PAGE, name="K [1] and V [1, 1, 1]")
    must_return(True, answer, token, token, BLOCKS, HEADS, PAGE, name="K and V [6, 2, 16]")
    part = torch.ones(2 * BLOCKS, HEADS, PAGE)[BLOCKS:]
    name = "K and V [6, 2, 16], a contiguous part of a longer tensor"
    must_return(True, answer, part, part, BLOCKS, HEADS, PAGE, name=name)
    refused: list[tuple[Tensor, Tensor]] = [(one, token), (token, one)]
    refused += [(bad, bad) for bad in map(torch.ones, ((HEADS,), (BLOCKS, HEADS), *BAD_SHAPES))]
    for other in (torch.ones(HEADS), torch.ones(PAGE, HEADS, BLOCKS)):  # the second has as many elements as `token`
        refused += [(known, other) for known in (one, token)] + [(other, known) for known in (one, token)]
    for k_scale, v_scale in refused:
        name = f"K {list(k_scale.shape)} and V {list(v_scale.shape)}"
        must_refuse(answer, k_scale, v_scale, BLOCKS, HEADS, PAGE, name=name)
    views = {
        "one number for each block and head, expanded": torch.ones(BLOCKS, HEADS, 1).expand(BLOCKS, HEADS, PAGE),
        "a transposed view": torch.ones(BLOCKS, PAGE, HEADS).transpose(1, 2),
        "every second block of a longer tensor": torch.ones(2 * BLOCKS, HEADS, PAGE)[::2],
    }
    expanded = one.expand(BLOCKS, HEADS, PAGE)
    # Element 0 is right for one expanded number, so False is as true as a refusal.
    must_refuse(
        answer,
        expanded,
        expanded,
        BLOCKS,
        HEADS,
        PAGE,
        name="K and V [6, 2, 16], one number, expanded",
        or_return=False,
    )
    for name, view in views.items():
        for k_scale, v_scale, who in ((view, view, "K and V"), (view, token, "K"), (token, view, "V")):
            must_refuse(answer, k_scale, v_scale, BLOCKS, HEADS, PAGE, name=f"{who} [6, 2, 16], {name}")


@exercise("06.2", correct="one formula, with stride 0 along every missing axis")
def strides_of(answer: Callable[..., Any]) -> None:
    wide = torch.ones(BLOCKS, PAGE, HEADS)
    scales = {
        "one element, [1]": torch.ones(1),
        "one element, []": torch.tensor(1.0),
        "one element, [1, 1, 1]": torch.ones(1, 1, 1),
        "[2]": torch.ones(HEADS),
        "[2], every third of a longer tensor": torch.ones(3 * HEADS)[::3],
        "[6, 2]": torch.ones(BLOCKS, HEADS),
        "[6, 2], a transposed view": torch.ones(HEADS, BLOCKS).T,
        "[6, 2, 16]": torch.ones(BLOCKS, HEADS, PAGE),
        "[6, 2, 16], a transposed view": wide.transpose(1, 2),
    }
    for name, scale in scales.items():
        s = resolve(scale, num_blocks=BLOCKS, num_heads=HEADS, page_size=PAGE, device=scale.device)
        strides = (s.stride_block, s.stride_head, s.stride_slot)
        must_return(strides, answer, scale, BLOCKS, HEADS, PAGE, name=f"a scale of {name}")
    for shape in BAD_SHAPES:
        must_refuse(answer, torch.ones(shape), BLOCKS, HEADS, PAGE, name=f"a scale of shape {list(shape)}")


@exercise(
    "06.3",
    correct="the scale passes the rule, and the kernel reads outside the tensor",
    not_yet="give a tensor, or a tuple of ints such as (6, 2, 16)",
)
def escaping_scale(answer: Any) -> None:
    if isinstance(answer, Tensor):
        scale, name = answer, f"{tuple(answer.shape)} with strides {answer.stride()}"
        if scale.dtype != torch.float32:
            raise Wrong(f"the scale has dtype {scale.dtype}; use torch.float32")
    elif isinstance(answer, list | tuple) and all(type(n) is int and n > 0 for n in answer):
        if math.prod(answer) > 2**20:
            raise Wrong(f"{tuple(answer)} has {math.prod(answer)} elements; use fewer, not more")
        scale, name = torch.ones(tuple(answer)), str(tuple(answer))
    else:
        raise Wrong(f"expected a tensor or a tuple of positive ints, got {answer!r:.60}")
    if scale.numel() == 1:
        raise Wrong(f"{name} has one element: the rule returns False, and element 0 exists")
    if scale.ndim != 3:
        raise Wrong(f"{name} has {scale.ndim} axes: the rule refuses it")
    if not scale.numel():
        raise Wrong(f"{name} has no element; give a scale that a layer could have")
    if not _run_old_kernel(scale).violations:
        raise Wrong(f"{name} passes the rule, but the kernel read nothing outside its {scale.numel()} elements")


def _run_old_kernel(scale: Tensor) -> Trace:
    """A trace of the old kernel on the last token of every block, with the flag of a scale per token."""
    device = "cuda" if has_gpu() else "cpu"  # the launcher refuses CPU tensors where kernels are compiled
    if scale.device.type != device:
        # `to` would copy a view into contiguous memory.
        sizes, strides = scale.shape, scale.stride()
        span = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        scale = torch.ones(span, device=device).as_strided(sizes, strides)
    pool = torch.zeros(BLOCKS, PAGE, HEADS, DIM, device=device)
    key, value = torch.zeros(2, BLOCKS, HEADS, DIM, device=device)
    cu_seqlens = torch.arange(BLOCKS + 1, dtype=torch.int32, device=device)
    table = torch.arange(BLOCKS, dtype=torch.int32, device=device)[:, None]
    starts = torch.full((BLOCKS,), PAGE - 1, dtype=torch.int32, device=device)
    with trace() as t:
        before_fix.cp_mha_gather_cache(
            pool, pool, key, value, table, scale, scale, cu_seqlens, before_fix.token_to_batch(cu_seqlens), starts,
            True, "NHD", BLOCKS, True,
        )  # fmt: skip
    return t
