"""The implementations that `kvgather bench gather` times: our gather, upstream's form of it, plain torch; and the build
of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Built
from ..formats.fp8 import FORMATS, dequantize
from ..formats.layout import as_nhd
from ..gather.compat import cp_mha_gather_cache
from ..plan import GatherPlan
from .runner import Call

Outputs = tuple[Tensor, Tensor]
Implementation = Callable[[Built, Outputs], Call]
"""Prepares the call to time, from a case's tensors and the rows to fill."""


def ours(built: Built, out: Outputs) -> Call:
    """This package's gather, checks included."""
    return partial(built.cache.gather, built.plan, out_dtype=built.case.out_dtype, out=out)


def token_per_program(built: Built, out: Outputs) -> Call:
    """One program per (token, head): upstream's form in our rewrite, with the right scale kind."""
    from ..lab import before_fix

    return partial(before_fix.cp_mha_gather_cache, *_engines_arguments(built, out))


def engines_call(built: Built, out: Outputs) -> Call:
    """`cp_mha_gather_cache`, as engines call it."""
    return partial(cp_mha_gather_cache, *_engines_arguments(built, out))


def upstream_form(built: Built, out: Outputs) -> Call:
    """One raw launch of upstream's form of the kernel (our rewrite), with the right scale kind."""
    from ..lab.before_fix import raw_launch

    return raw_launch(*_engines_arguments(built, out))


def _engines_arguments(built: Built, out: Outputs) -> tuple[Any, ...]:
    """The arguments of `cp_mha_gather_cache`; sequences begin at 0, and the flag agrees with the scale."""
    from ..lab.before_fix import token_to_batch

    case, cache = built.case, built.cache
    batches = token_to_batch(built.cu_seqlens_k)
    starts = torch.zeros(len(case.lengths), dtype=torch.int32, device=batches.device)
    return (
        cache.key_cache, cache.value_cache, *out, built.block_table, cache.k_scale, cache.v_scale, built.cu_seqlens_k,
        batches, starts, True, case.layout, case.total_tokens, case.k_kind == "per-token-head",
    )  # fmt: skip


def torch_index(built: Built, out: Outputs) -> Call:
    """Plain torch: one advanced index per pool over all tokens, then the formula."""
    case = built.case
    position = torch.cat([torch.arange(n, device=out[0].device) for n in case.lengths])
    lengths = built.cu_seqlens_k.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=position.device), lengths)
    block = built.block_table[sequence, position // case.page_size].long()
    slot = position % case.page_size

    def run() -> None:
        for pool, scale, target in _sides(built, out):
            codes = pool.view(torch.uint8) if pool.dtype in FORMATS else pool
            which = "key" if target is out[0] else "value"
            if case.layout == "SHUFFLE" and which == "value":
                x = pool.shape[4]
                rows = codes[block, :, slot // x, :, slot % x]
            elif case.layout == "SHUFFLE":
                rows = codes[block, :, :, slot].flatten(2, 3)
            else:
                rows = codes[block, slot] if case.layout == "NHD" else codes[block, :, slot]
            target.copy_(dequantize(rows.view(pool.dtype), _factor(scale, block, slot), target.dtype))

    return run


def python_loop(built: Built, out: Outputs) -> Call:
    """An engine's fallback without a kernel: a Python loop over the blocks of every sequence."""
    case = built.case
    table = built.block_table.tolist()

    def run() -> None:
        row = 0
        for sequence, length in enumerate(case.lengths):
            for column, begin in enumerate(range(0, length, case.page_size)):
                block, rows = table[sequence][column], min(case.page_size, length - begin)
                for pool, scale, target in _sides(built, out):
                    page = as_nhd(pool[block : block + 1], case.layout, "key" if target is out[0] else "value")[0]
                    factor = scale if scale is None or scale.ndim < 3 else scale[block].t()[:, :, None]
                    target[row : row + rows] = dequantize(page, factor, target.dtype)[:rows]
                row += rows

    return run


def plan_build(built: Built, out: Outputs) -> Call:
    """The build of the checked plan, which serves all layers; it does not synchronize, so it can be captured.

    Raises:
        ArithmeticError: the records differ from those built on a CPU.
    """

    def plan_of(block_table: Tensor, cu_seqlens_k: Tensor) -> GatherPlan:
        return GatherPlan.build(
            block_table, cu_seqlens_k, page_size=built.case.page_size, num_blocks=built.cache.geometry.num_blocks,
            total_tokens=built.case.total_tokens,
        )  # fmt: skip

    run = partial(plan_of, built.block_table, built.cu_seqlens_k)
    if not torch.equal(run().records.cpu(), plan_of(built.block_table.cpu(), built.cu_seqlens_k.cpu()).records):
        raise ArithmeticError(f"plan build is not the reference on {built.case.name}")
    return run


def _sides(built: Built, out: Outputs) -> Iterable[tuple[Tensor, Tensor | None, Tensor]]:
    cache = built.cache
    return (cache.key_cache, cache.k_scale, out[0]), (cache.value_cache, cache.v_scale, out[1])


def _factor(scale: Tensor | None, block: Tensor, slot: Tensor) -> Tensor | None:
    if scale is None or scale.numel() == 1:
        return scale
    return scale[:, None] if scale.ndim == 1 else scale[block, :, slot][..., None]
