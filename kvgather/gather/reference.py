"""The gather in plain torch, on any device: the specification, and what a CPU really runs.

Every element is `(cache.float() * scale).to(out_dtype)`, every row is where its record says. Pages are copied out of
the pool a megabyte at a time, so that decoding, scaling and rounding happen in the cache of the processor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.fp8 import FORMATS, decode, decode_into_bfloat16
from ..formats.layout import Which, as_nhd
from ..formats.scale import Scale

_CHUNK_ELEMENTS = 1 << 20  # 1 MiB of codes, 4 MiB of FP32: 16 ms for 33 M elements, 53 ms with chunks of 64 Ki


@torch.no_grad()
def gather_pool(
    pool: Tensor, layout: str, which: Which, scale: Scale, records: Tensor, out: Tensor, zero_bad: bool = False
) -> None:
    """Fill `out` with the rows of one pool that a plan's records name.

    Args:
        pool: K or V in `layout`, any strides.
        layout, which: how to read it.
        scale: a resolved scale.
        records: `[n, 4]` int32 of a `GatherPlan` made for this pool.
        out: `[rows, heads, dim]`, any float dtype, or the pool's own FP8 dtype when there is no scale.
        zero_bad: whether rows of a bad block id are 0; else they are NaN.
    """
    records = records[records[:, 2] > 0].long()
    if len(records) == 0:
        return
    page_size = as_nhd(pool[:0], layout, which).shape[1]
    per_chunk = max(1, _CHUNK_ELEMENTS // max(1, page_size * out.shape[1] * out.shape[2]))
    raw = out.dtype == pool.dtype and scale.kind == "none"
    for part in records.split(per_chunk):
        block, first_row, rows, begin = part.unbind(1)
        target = out[int(first_row[0]) : int(first_row[-1] + rows[-1])]
        pages = _read_pages(pool, layout, which, block)
        full = len(target) == len(part) * page_size
        if full and not raw and _uniform_into(pages, pool.dtype, scale, block, target):
            continue
        values = pages.view(pool.dtype) if raw else _values(pages, pool.dtype, scale, block)
        bad = (block < 0).nonzero()[:, 0]  # by number: a mask is laid over every value, a third of the time
        if raw and pool.dtype in FORMATS:
            values.view(torch.uint8)[bad] = 0 if zero_bad else FORMATS[pool.dtype].nan_code
        else:
            values[bad] = 0 if zero_bad else math.nan
        flat = values.flatten(0, 1)  # [pages * page, heads, dim]
        if not full:
            slot = torch.arange(page_size, device=out.device)
            inside = (slot >= begin[:, None]) & (slot < (begin + rows)[:, None])  # [pages, page]
            flat = flat[inside.flatten()]
        target.copy_(flat)


def _read_pages(pool: Tensor, layout: str, which: Which, block: Tensor) -> Tensor:
    """A copy of whole pages, `[pages, page, heads, dim]`, contiguous; FP8 as uint8. For block −1 it is some page."""
    held = pool.view(torch.uint8) if pool.dtype in FORMATS else pool
    if pool.shape[0] == 0:  # nothing to read: every block is −1
        held = held.new_zeros((1, *held.shape[1:]))
    return as_nhd(held.index_select(0, block.clamp_min(0)), layout, which).contiguous()


def _values(pages: Tensor, dtype: torch.dtype, scale: Scale, block: Tensor) -> Tensor:
    """FP32 values of pages, scaled."""
    uniform = scale.tensor.item() if scale.kind == "per-tensor" and scale.tensor is not None else 1.0
    values = decode(pages, dtype, uniform) if dtype in FORMATS else pages.float().mul_(uniform)
    if scale.kind not in ("none", "per-tensor") and scale.tensor is not None and len(scale.tensor):
        heads = torch.arange(values.shape[2], device=pages.device)
        slots = torch.arange(values.shape[1], device=pages.device)
        factor = scale.at(block.clamp_min(0)[:, None, None], heads, slots[:, None])  # [pages, page, heads] or less
        assert factor is not None
        values.mul_(factor[..., None])
    return values


def _uniform_into(pages: Tensor, dtype: torch.dtype, scale: Scale, block: Tensor, target: Tensor) -> bool:
    """Fill `target` the short way: FP8 to BF16 with one scale for all, on a CPU. Returns whether it could be done."""
    if (
        dtype not in FORMATS
        or scale.kind not in ("none", "per-tensor")
        or target.dtype != torch.bfloat16
        or target.device.type != "cpu"
        or int(block.min()) < 0
    ):
        return False
    uniform = 1.0 if scale.tensor is None else scale.tensor.item()
    return decode_into_bfloat16(pages.view(target.shape), dtype, uniform, target)
