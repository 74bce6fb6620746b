"""The gather in plain torch, on any device: the specification, and the backend on a CPU.

Every element is `(cache.float() * scale).to(out_dtype)`, in the row that its record gives. Pages are copied from the
pool in chunks of 1 MiB, so that decoding, scaling and rounding work in the processor's cache.
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
    """Fill `out` with the rows of a plan's records from one pool.

    Args:
        pool: K or V in `layout`, any strides.
        layout, which: the pool's layout, and "key" or "value".
        scale: a resolved scale.
        records: `[n, 4]` int32 of a `GatherPlan` for this pool.
        out: `[rows, heads, dim]`, any float dtype, or the pool's FP8 dtype if there is no scale.
        zero_bad: whether rows of a bad block id are 0 instead of NaN.
    """
    records = records[records[:, 2] > 0].long()
    if len(records) == 0:
        return
    page_size = as_nhd(pool[:0], layout, which).shape[1]
    per_chunk = max(1, _CHUNK_ELEMENTS // max(1, page_size * out.shape[1] * out.shape[2]))
    raw = out.dtype == pool.dtype and scale.kind == "none"
    for part in records.split(per_chunk):
        block, first_row, rows, first_offset = part.unbind(1)
        target = out[int(first_row[0]) : int(first_row[-1] + rows[-1])]
        pages = _read_pages(pool, layout, which, block)
        full = len(target) == len(part) * page_size
        if full and not raw and _uniform_into(pages, pool.dtype, scale, block, target):
            continue
        values = pages.view(pool.dtype) if raw else _values(pages, pool.dtype, scale, block)
        bad = (block < 0).nonzero()[:, 0]  # indices, because a mask over all values took a third of the time
        if raw and pool.dtype in FORMATS:
            values.view(torch.uint8)[bad] = 0 if zero_bad else FORMATS[pool.dtype].nan_code
        else:
            values[bad] = 0 if zero_bad else math.nan
        flat = values.flatten(0, 1)  # [pages * page, heads, dim]
        if not full:
            page_offset = torch.arange(page_size, device=out.device)
            in_record = (page_offset >= first_offset[:, None]) & (
                page_offset < (first_offset + rows)[:, None]
            )  # [pages, page]
            flat = flat[in_record.flatten()]
        target.copy_(flat)


def _read_pages(pool: Tensor, layout: str, which: Which, block: Tensor) -> Tensor:
    """Copy whole pages: `[pages, page, heads, dim]`, contiguous, FP8 as uint8. Block −1 copies an arbitrary page."""
    codes = pool.view(torch.uint8) if pool.dtype in FORMATS else pool
    if pool.shape[0] == 0:  # every block is −1
        codes = codes.new_zeros((1, *codes.shape[1:]))
    return as_nhd(codes.index_select(0, block.clamp_min(0)), layout, which).contiguous()


def _values(pages: Tensor, dtype: torch.dtype, scale: Scale, block: Tensor) -> Tensor:
    """Return the scaled FP32 values of pages."""
    uniform = scale.tensor.item() if scale.kind == "per-tensor" and scale.tensor is not None else 1.0
    values = decode(pages, dtype, uniform) if dtype in FORMATS else pages.float().mul_(uniform)
    if scale.kind not in ("none", "per-tensor") and scale.tensor is not None and len(scale.tensor):
        heads = torch.arange(values.shape[2], device=pages.device)
        page_offset = torch.arange(values.shape[1], device=pages.device)[:, None]
        factor = scale.at(block.clamp_min(0)[:, None, None], heads, page_offset)  # broadcasts to [pages, page, heads]
        assert factor is not None
        values.mul_(factor[..., None])
    return values


def _uniform_into(pages: Tensor, dtype: torch.dtype, scale: Scale, block: Tensor, target: Tensor) -> bool:
    """Fill `target` in one pass, for FP8 to BF16 with one scale or none on a CPU. Return whether it was filled."""
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
