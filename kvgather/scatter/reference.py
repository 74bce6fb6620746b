"""The write to one pool in plain torch, the specification of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.fp8 import FORMATS, computed_scale, quantize
from ..formats.layout import Which
from ..formats.scale import Scale


def write_pool(
    pool: Tensor, layout: str, which: Which, scale: Scale, rows: Tensor, block: Tensor, page_offset: Tensor
) -> None:
    """Quantize `rows` `[n, heads, dim]` and write row i to (block[i], page_offset[i]) of one pool.

    Args:
        pool: K or V in `layout`, any strides.
        layout, which: the pool's layout, and "key" or "value".
        scale: a resolved scale; a per-token-head scale is computed and stored.
        rows: `[n, heads, dim]`, floating point.
        block, page_offset: `[n]` int64.
    """
    if scale.kind == "per-token-head":
        assert scale.tensor is not None
        scale.tensor[block, :, page_offset] = computed_scale(rows, pool.dtype)  # [n, heads]
    heads = torch.arange(rows.shape[1], device=pool.device)
    factor = scale.at(block[:, None], heads, page_offset[:, None])  # broadcasts to [n, heads]
    codes = quantize(rows, factor if factor is None or factor.ndim == 0 else factor[..., None], pool.dtype)
    if pool.dtype in FORMATS:
        codes, pool = codes.view(torch.uint8), pool.view(torch.uint8)
    if layout == "NHD":
        pool[block, page_offset] = codes
    elif layout == "HND":
        pool[block, :, page_offset] = codes
    elif which == "key":
        pool[block, :, :, page_offset] = codes.unflatten(2, (-1, pool.shape[4]))
    else:
        x = pool.shape[4]
        pool[block, :, page_offset // x, :, page_offset % x] = codes
