"""The write to one pool in plain torch: the kernel's specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.fp8 import FORMATS, computed_scale, quantize
from ..formats.layout import Which
from ..formats.scale import Scale


def write_pool(
    pool: Tensor, layout: str, which: Which, scale: Scale, rows: Tensor, block: Tensor, slot: Tensor
) -> None:
    """Quantize `rows` `[n, heads, dim]` and put row i into (block[i], slot[i]) of one pool; indices are int64 `[n]`."""
    if scale.kind == "per-token-head":
        assert scale.tensor is not None
        scale.tensor[block, :, slot] = computed_scale(rows, pool.dtype)  # [n, heads]
    heads = torch.arange(rows.shape[1], device=pool.device)
    factor = scale.at(block[:, None], heads, slot[:, None])  # [n, heads] or less
    codes = quantize(rows, factor if factor is None or factor.ndim == 0 else factor[..., None], pool.dtype)
    if pool.dtype in FORMATS:
        codes, pool = codes.view(torch.uint8), pool.view(torch.uint8)
    if layout == "NHD":
        pool[block, slot] = codes
    elif layout == "HND":
        pool[block, :, slot] = codes
    elif which == "key":
        pool[block, :, :, slot] = codes.unflatten(2, (-1, pool.shape[4]))
    else:
        x = pool.shape[4]
        pool[block, :, slot // x, :, slot % x] = codes
