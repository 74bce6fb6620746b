"""Pools, scales and outputs in the forms of inference engines: views of one tensor, swapped axes, scales in pages."""

from __future__ import annotations

import pytest
import torch

import kvgather as kg
from tests.user_reports.oracle import BACKENDS, assert_near, attention, stored

pytestmark = pytest.mark.triton
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("padding", [4, 16])
def test_scales_inside_the_pages(backend: str, padding: int) -> None:
    """Each head's scale follows its codes. Reported as flashinfer-ai/flashinfer#3617, ovg-project/kvcached#424."""
    page, heads, dim, blocks = 4, 2, 16, 6
    raw = [torch.full((blocks, page, heads, dim + padding), 0x7F, dtype=torch.uint8) for _ in "kv"]
    codes = [r[..., :dim].view(torch.float8_e4m3fn) for r in raw]
    scales = [r.view(torch.float32)[..., dim // 4].permute(0, 2, 1) for r in raw]  # [blocks, heads, page]
    cache = kg.PagedKVCache.from_tensors(*codes, layout="NHD", k_scale=scales[0], v_scale=scales[1])
    assert [scale.kind for scale in cache.scales] == ["per-token-head", "per-token-head"]
    random = torch.Generator().manual_seed(3)
    k, v = torch.randn(7, heads, dim, generator=random) * 10, torch.randn(7, heads, dim, generator=random)
    cache.write(k, v, torch.tensor([20, 21, 22, 23, 4, 5, 6]), backend=backend)
    plan = kg.GatherPlan.build(torch.tensor([[5, 1]]), torch.tensor([0, 7]), page_size=page, num_blocks=blocks)
    wanted = [stored(x, x.abs().amax(-1, keepdim=True) / 448.0, torch.float8_e4m3fn) for x in (k, v)]
    for got, want in zip(cache.gather(plan, out_dtype=torch.float32, backend=backend), wanted, strict=True):
        assert (got.double() - want).abs().max() < 1e-6 * want.abs().max()
    for r in raw:
        assert (r[..., dim + 4 :] == 0x7F).all()
        assert (r[0] == 0x7F).all() and (r[1, 3] == 0x7F).all()  # unwritten slots are unchanged
    path = "direct" if backend == "triton" else "gather"
    batch = kg.PrefixBatch.build(
        torch.tensor([[5, 1]]), torch.tensor([0, 2]), torch.tensor([0, 7]), page_size=page, num_blocks=blocks
    )
    q = torch.randn(2, 4, dim, generator=random)
    out = kg.prefix_attention(q, None, None, cache, batch, path=path)
    assert_near(out, attention(q, [wanted[0]], [wanted[1]], [2])[0], 1e-4)


@each_backend
@pytest.mark.parametrize("view", ["HND view of NHD", "NHD view of HND", "heads outermost", "content interleaved"])
def test_pools_that_are_views(backend: str, view: str) -> None:
    """Reported as vllm-project/vllm#8200, LMCache/LMCache#2826 and #4467, ROCm/aiter#3492: axes were swapped."""
    blocks, page, heads, dim = 5, 4, 4, 16  # page = heads: the shape does not distinguish NHD from HND
    layout = "NHD"
    if view == "HND view of NHD":
        layout, pools = "HND", [torch.zeros(blocks, page, heads, dim).transpose(1, 2) for _ in "kv"]
    elif view == "NHD view of HND":
        pools = [torch.zeros(blocks, heads, page, dim).transpose(1, 2) for _ in "kv"]
    elif view == "heads outermost":
        layout, pools = "HND", [torch.zeros(heads, blocks, page, dim).transpose(0, 1) for _ in "kv"]
    else:
        pools = list(torch.zeros(blocks, page, heads, 2 * dim).split(dim, -1))
    cache = kg.PagedKVCache.from_tensors(*pools, layout=layout)
    k, v = torch.randn(2, 6, heads, dim, generator=torch.Generator().manual_seed(8))
    slots = torch.tensor([17, 18, 19, 4, 5, 6])
    cache.write(k, v, slots, backend=backend)
    for pool, x in zip(pools, (k, v), strict=True):
        nhd = pool if layout == "NHD" else pool.transpose(1, 2)
        assert torch.equal(nhd[slots // page, slots % page], x)
        assert (nhd != 0).any(-1).all(-1).sum() == 6
    plan = kg.GatherPlan.build(
        torch.tensor([[4, 1]]), torch.tensor([0, 6]), page_size=page, num_blocks=blocks, seq_starts=torch.tensor([1])
    )
    got = cache.gather(plan, out_dtype=torch.float32, backend=backend)
    assert torch.equal(got[0], k) and torch.equal(got[1], v)


@each_backend
def test_per_token_head_scales_are_indexed_by_their_strides(backend: str) -> None:
    blocks, page, heads = 3, 4, 4
    by_slot = torch.arange(1, 1 + blocks * page * heads, dtype=torch.float32).reshape(blocks, page, heads)
    ones = torch.ones(blocks, page, heads, 16).to(torch.float8_e4m3fn)
    plan = kg.GatherPlan.build(torch.tensor([[2, 0]]), torch.tensor([0, 8]), page_size=page, num_blocks=blocks)
    k, v = kg.gather(
        ones, ones, plan, k_scale=by_slot.transpose(1, 2), v_scale=by_slot.transpose(1, 2).contiguous(),
        out_dtype=torch.float32, backend=backend,
    )  # fmt: skip
    wanted = by_slot[[2, 0]].flatten(0, 1)[..., None].expand(8, heads, 16)
    assert torch.equal(k, wanted) and torch.equal(v, wanted)


@pytest.mark.parametrize("rows", ["separate", "interleaved"])
def test_k_and_v_are_gathered_into_one_workspace(rows: str) -> None:
    """One tensor contains both outputs, one after the other or with interleaved rows, without shared elements."""
    cache = kg.PagedKVCache(4, 4, 2, 16, dtype=torch.float32, device="cpu")
    k, v = torch.randn(2, 6, 2, 16, generator=torch.Generator().manual_seed(9))
    cache.write(k, v, torch.arange(6))
    plan = kg.GatherPlan.build(torch.tensor([[0, 1]]), torch.tensor([0, 6]), page_size=4, num_blocks=4)
    workspace = torch.zeros(2, 6, 2, 16) if rows == "separate" else torch.zeros(6, 2, 2, 16).transpose(0, 1)
    cache.gather(plan, out_dtype=torch.float32, out=(workspace[0], workspace[1]))
    assert torch.equal(workspace[0], k) and torch.equal(workspace[1], v)
