"""Writes to test with: caches of every layout, dtype and scale kind, awkward values, and the write as a plain loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import POOL_STYLES, Case
from kvgather.formats.fp8 import FORMATS, POOL_DTYPES, SCALE_FLOOR, quantize
from kvgather.formats.layout import LAYOUTS, element_offset
from kvgather.formats.scale import KINDS
from tests.gather.oracle import first_difference, scale_at

KIND_PAIRS = [(KINDS[i], KINDS[(i + 1) % 5]) for i in (0, 2, 4)]  # each kind at least once
SLOTS = [17, -1, 40, 5]
WRITES = [
    Case(layout=layout, dtype=dtype, k_kind=k_kind, v_kind=v_kind, page_size=16, k_dim=32, v_dim=16, num_blocks=3)
    for layout in LAYOUTS
    for dtype in POOL_DTYPES
    for k_kind, v_kind in KIND_PAIRS
]
WRITES += [
    Case(layout=layout, k_kind="per-token-head", v_kind="per-head", pool_style=style, num_blocks=3)
    for layout in LAYOUTS
    for style in POOL_STYLES[1:]
]
WRITES += [
    Case(num_heads=3, k_dim=40, v_dim=24, page_size=7, num_blocks=6, k_kind="per-token-head"),
    Case(num_heads=9, k_dim=8, v_dim=80, page_size=15, num_blocks=3, v_kind="per-page-head"),
]


def awkward(n: int, heads: int, dim: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of every size: zeros of both signs, ties, subnormals, what overflows, infinities, NaN."""
    random = torch.Generator().manual_seed(3)
    values = torch.randn(n, heads, dim, generator=random) * torch.exp2(torch.randint(-12, 12, (n, heads, dim)))
    special = [0.0, -0.0, 1.0625, -1.1875, 2.0**-10, 1e-30, -1e-42, 1e6, -3e38, math.inf, -math.inf, math.nan]
    flat = values.view(-1)
    flat[5 :: max(7, flat.numel() // 12)][: len(special)] = torch.tensor(special)
    values[-1, -1] = 0.0  # a row whose computed scale is the floor
    return values.to(dtype).to(device)


def obvious_write(cache: kg.PagedKVCache, k: Tensor, v: Tensor, slots: list[int]) -> None:
    """A write as anyone would write it first, on a CPU."""
    page = cache.geometry.page_size
    for which, pool, scale, kind, rows in (
        ("key", cache.key_cache, cache.k_scale, cache.k_kind, k),
        ("value", cache.value_cache, cache.v_scale, cache.v_kind, v),
    ):
        memory = pool.as_strided((pool.untyped_storage().nbytes() // pool.element_size(),), (1,), 0)
        for token, slot in enumerate(slots):
            if slot < 0:
                continue
            block, offset = divmod(slot, page)
            for head in range(rows.shape[1]):
                row = rows[token, head].float()
                if kind == "per-token-head":
                    assert scale is not None
                    finite = row[row.isfinite()].abs()
                    largest = finite.max() if len(finite) else torch.tensor(0.0)
                    limit = FORMATS[pool.dtype].max if pool.dtype in FORMATS else 1.0
                    scale[block, head, offset] = max(largest / torch.tensor(limit), torch.tensor(SCALE_FLOOR))
                factor = torch.tensor(scale_at(scale, block, head, offset))
                for dim in range(rows.shape[2]):
                    value = row[dim] if scale is None else row[dim] / factor
                    at = pool.storage_offset() + element_offset(pool, cache.layout, which, block, head, offset, dim)
                    memory[at] = quantize(value, None, pool.dtype)


def contents(cache: kg.PagedKVCache) -> list[Tensor]:
    held = [cache.key_cache, cache.value_cache, cache.k_scale, cache.v_scale]
    return [tensor.clone() for tensor in held if tensor is not None]


def assert_same_contents(got: list[Tensor], wanted: list[Tensor]) -> None:
    for nth, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert not first_difference(ours, theirs), f"tensor {nth}: {first_difference(ours, theirs)}"
