"""The gather in plain torch, on any device: the specification, and what a CPU really runs.

Every element is `(cache.float() * scale).to(out_dtype)`, every row is where its record says. Pages are copied out of
the pool a megabyte at a time, so that decoding, scaling and rounding happen in the cache of the processor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.fp8 import FORMATS, decode
from ..formats.layout import Which, as_nhd
from ..formats.scale import Scale

_CHUNK_ELEMENTS = 1 << 20  # 1 MiB of codes, 4 MiB of FP32: 16 ms for 33 M elements, 53 ms with chunks of 64 Ki


def gather_pool(pool: Tensor, layout: str, which: Which, scale: Scale, records: Tensor, out: Tensor) -> None:
    """Fill `out` with the rows of one pool that a plan's records name.

    Args:
        pool: K or V in `layout`, any strides.
        layout, which: how to read it.
        scale: a resolved scale.
        records: `[n, 4]` int32 of a `GatherPlan` made for this pool.
        out: `[rows, heads, dim]`, any float dtype, or the pool's own FP8 dtype when there is no scale.
    """
    records = records[records[:, 2] > 0].long()
    if len(records) == 0:
        return
    page_size = as_nhd(pool[:0], layout, which).shape[1]
    per_chunk = max(1, _CHUNK_ELEMENTS // max(1, page_size * out.shape[1] * out.shape[2]))
    for part in records.split(per_chunk):
        block, first_row, rows, begin = part.unbind(1)
        values = _pages(pool, layout, which, scale, block, raw=out.dtype == pool.dtype and scale.kind == "none")
        first, last = int(first_row[0]), int(first_row[-1] + rows[-1])
        flat = values.flatten(0, 1)  # [pages * page, heads, dim]
        if last - first != flat.shape[0]:
            slot = torch.arange(page_size, device=out.device)
            inside = (slot >= begin[:, None]) & (slot < (begin + rows)[:, None])  # [pages, page]
            flat = flat[inside.flatten()]
        out[first:last] = flat


def _pages(pool: Tensor, layout: str, which: Which, scale: Scale, block: Tensor, raw: bool) -> Tensor:
    """Values of whole pages, `[pages, page, heads, dim]`: FP32, or the pool's dtype when `raw`; NaN for block −1."""
    fmt = FORMATS.get(pool.dtype)
    held = pool if fmt is None else pool.view(torch.uint8)
    bad = block < 0
    any_bad = bool(bad.any())
    if pool.shape[0] == 0:  # nothing to read: every block is −1
        held, scale = held.new_zeros((1, *held.shape[1:])), Scale("none", None)
    pages = as_nhd(held.index_select(0, block.clamp_min(0)), layout, which)
    if raw:
        if any_bad:
            pages[bad] = math.nan if fmt is None else fmt.nan_code
        return pages.contiguous().view(pool.dtype)
    uniform = float(scale.tensor) if scale.kind == "per-tensor" and scale.tensor is not None else 1.0
    values = pages.float().mul_(uniform) if fmt is None else decode(pages, pool.dtype, uniform)
    if scale.kind not in ("none", "per-tensor"):
        heads = torch.arange(values.shape[2], device=pool.device)
        slots = torch.arange(values.shape[1], device=pool.device)
        factor = scale.at(block.clamp_min(0)[:, None, None], heads, slots[:, None])  # [pages, page, heads] or less
        assert factor is not None
        values.mul_(factor[..., None])
    if any_bad:
        values[bad] = math.nan
    return values
