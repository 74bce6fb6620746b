"""Unwritten slots contain NaN in these tests, and have no effect on any row.

Reported as Dao-AILab/flash-attention#1745, ROCm/aiter#5401, flashinfer-ai/flashinfer#941 and #4452.
"""

from __future__ import annotations

import math

import pytest
import torch

import kvgather as kg
from tests.user_reports.oracle import FP8_MAX, PATHS, assert_near, attention, offsets, poisoned, scattered, stored

pytestmark = pytest.mark.triton
each_path = pytest.mark.parametrize(("path", "workspace"), PATHS)


@each_path
@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
@pytest.mark.parametrize("dtype", [*FP8_MAX, torch.bfloat16], ids=str)
def test_unwritten_slots_have_no_effect(path: str, workspace: int | None, layout: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k, page = [1, 4, 0, 17], [13, 33, 16, 17], 16
    table, slots = scattered(lengths_k, page, 9)
    random = torch.Generator().manual_seed(1)
    cache = poisoned(kg.PagedKVCache(9, page, 2, 16, layout=layout, dtype=dtype, scale="per-token-head", device="cpu"))
    maximum = FP8_MAX.get(dtype, 1.0)
    keys, values = [], []
    for n, seq_slots in zip(lengths_k, slots, strict=True):
        k, v = torch.randn(2, n, 2, 16, generator=random)
        cache.write(k, v, seq_slots)
        for x, expected in ((k, keys), (v, values)):
            scale = x.abs().amax(-1, keepdim=True) / maximum
            unclamped = (x / scale).to(dtype).double() * scale.double()
            expected.append(stored(x, scale, dtype) if dtype in FP8_MAX else unclamped)
    q = torch.randn(sum(lengths_q), 4, 16, generator=random)
    batch = kg.PrefixBatch.build(table, offsets(lengths_q), offsets(lengths_k), page_size=page, num_blocks=9)
    batch.check()
    out, lse = kg.prefix_attention(
        q, None, None, cache, batch, path=path, workspace_tokens=workspace, return_lse=True
    )  # fmt: skip
    wanted_out, wanted_lse = attention(q, keys, values, lengths_q)
    assert_near(out, wanted_out, 1e-5)
    assert_near(lse, wanted_lse, 1e-5)


@each_path
def test_rows_before_the_first_key_are_empty(path: str, workspace: int | None) -> None:
    """With more rows than tokens, the last rows belong to the tokens, and `check()` raises."""
    random = torch.Generator().manual_seed(7)
    k, v = torch.randn(2, 2, 1, 16, generator=random)
    cache = poisoned(kg.PagedKVCache(4, 4, 1, 16, dtype=torch.float32, device="cpu"))
    cache.write(k, v, torch.arange(2))
    batch = kg.PrefixBatch.build(torch.tensor([[0]]), offsets([5]), offsets([2]), page_size=4, num_blocks=4)
    q = torch.randn(5, 3, 16, generator=random)
    out, lse = kg.prefix_attention(q, None, None, cache, batch, path=path, workspace_tokens=workspace, return_lse=True)
    wanted, wanted_lse = attention(q, [k], [v], [5])
    assert_near(out, wanted, 1e-5)
    assert_near(lse, wanted_lse, 1e-5)
    assert (lse[:3] == -math.inf).all() and (out[:3] == 0).all()
    with pytest.raises(kg.PlanError, match="sequence 0"):
        batch.check()
