"""Checks of chapter 06: a guard for the old kernel, the strides of a scale, and a shape that escapes a rule."""

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
from kvgather.workbook.checks import Wrong, exercise, expect

BLOCKS, HEADS, PAGE, DIM = 6, 2, 16, 16
BAD_SHAPES = ((7,), (HEADS, BLOCKS), (PAGE, HEADS, BLOCKS), (BLOCKS * HEADS * PAGE,), (1, HEADS, 1))


@exercise("06.1", correct="the flag agrees with the shape, or the kernel is not called")
def honest_flag(answer: Callable[..., Any]) -> None:
    one, token = torch.ones(1), torch.ones(BLOCKS, HEADS, PAGE)
    expect(False, answer(one, one.view(1, 1, 1), BLOCKS, HEADS, PAGE), "one element each")
    expect(True, answer(token, token, BLOCKS, HEADS, PAGE), "[6, 2, 16] each")
    refused: list[tuple[Tensor, Tensor]] = [(one, token), (token, one)]
    refused += [(bad, bad) for bad in map(torch.ones, ((HEADS,), (BLOCKS, HEADS), *BAD_SHAPES))]
    refused += [(token, torch.ones(HEADS)), (torch.ones(HEADS), token)]
    for k_scale, v_scale in refused:
        name = f"K {list(k_scale.shape)} and V {list(v_scale.shape)}"
        _must_refuse(answer, k_scale, v_scale, BLOCKS, HEADS, PAGE, name=name)


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
        got = answer(scale, BLOCKS, HEADS, PAGE)
        expect((s.stride_block, s.stride_head, s.stride_slot), got, f"a scale of {name}")
    for shape in BAD_SHAPES:
        _must_refuse(answer, torch.ones(shape), BLOCKS, HEADS, PAGE, name=f"a scale of shape {list(shape)}")


@exercise(
    "06.3",
    correct="the shape passes the rule, and the kernel reads outside the tensor: a rank is not a shape",
    not_yet="give a tuple of ints, such as (6, 2, 16)",
)
def escaping_shape(shape: Any) -> None:
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n > 0 for n in shape):
        raise Wrong(f"expected a tuple of positive ints, got {shape!r:.60}")
    if math.prod(shape) > 2**20:
        raise Wrong(f"{tuple(shape)} has {math.prod(shape)} elements; use fewer, not more")
    if math.prod(shape) == 1:
        raise Wrong(f"{tuple(shape)} has one element: the rule returns False, and element 0 exists")
    if len(shape) != 3:
        raise Wrong(f"{tuple(shape)} has {len(shape)} axes: the rule refuses it")
    if not _run_old_kernel(torch.ones(tuple(shape))).violations:
        raise Wrong(
            f"{tuple(shape)} passes the rule, but the kernel read nothing outside its {math.prod(shape)} elements"
        )


def _must_refuse(answer: Callable[..., Any], *arguments: Any, name: str) -> None:
    try:
        got = answer(*arguments)
    except ValueError:
        return
    raise Wrong(f"{name}: expected a ValueError, got {got!r}")


def _run_old_kernel(scale: Tensor) -> Trace:
    """A trace of the old kernel on the last slot of every block, with the flag of a scale per token."""
    device = "cuda" if has_gpu() else "cpu"  # the launcher refuses CPU tensors where kernels are compiled
    scale, pool = scale.to(device), torch.zeros(BLOCKS, PAGE, HEADS, DIM, device=device)
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
