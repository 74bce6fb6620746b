"""The kernels' formula for an element's offset is the one that `PoolStrides` specifies, in every layout."""

from __future__ import annotations

import pytest
import torch

from kvgather.formats.layout import LAYOUTS, PoolStrides, Which, pool_shape
from tests.where import on_each_device

BLOCKS, PAGE, HEADS = 3, 32, 2


@on_each_device
@pytest.mark.parametrize("heads_outermost", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 48])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_are_those_of_the_pool_strides(
    where: str, layout: str, which: Which, dim: int, dtype: torch.dtype, heads_outermost: bool
) -> None:
    from kvgather.kernels.address import PoolForm, pool_strides
    from tests.kernels._offset_kernel import offset_kernel

    pool = torch.empty(pool_shape(layout, which, BLOCKS, PAGE, HEADS, dim, dtype.itemsize), dtype=dtype, device=where)
    if heads_outermost:
        heads = 2 if layout == "NHD" else 1
        pool = torch.empty_like(pool.movedim(heads, 0), memory_format=torch.contiguous_format).movedim(0, heads)
    form = PoolForm.of(pool, layout, which, "none")
    assert (form.page_size, form.num_heads, form.dim, form.wide) == (PAGE, HEADS, dim, False)
    offsets = torch.full((BLOCKS, HEADS, PAGE, dim), -1, dtype=torch.int64, device=where)
    offset_kernel[(BLOCKS * HEADS,)](offsets, pool_strides(pool, layout, which, form), form, DIMS=64)
    places = torch.meshgrid(*(torch.arange(size, device=where) for size in offsets.shape), indexing="ij")
    assert torch.equal(offsets, PoolStrides.of(pool, layout, which).offset(*places))
    assert offsets.unique().numel() == pool.numel()
