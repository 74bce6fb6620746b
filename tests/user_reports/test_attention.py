"""Attention with unusual sizes, strides and precisions."""

from __future__ import annotations

import pytest
import torch

import kvgather as kg
from tests.user_reports.oracle import FP8_MAX, PATHS, assert_near, attention, offsets, poisoned, scattered, stored

pytestmark = pytest.mark.triton
each_path = pytest.mark.parametrize(("path", "workspace"), PATHS)
SIZES = [(1, 96, 1, 7), (3, 72, 2, 3), (12, 80, 3, 5), (24, 40, 1, 8), (544, 24, 1, 1), (7, 1, 2, 1)]


@each_path
@pytest.mark.parametrize(("page", "dim", "heads", "group"), SIZES)
def test_sizes_that_are_no_powers_of_two(
    path: str, workspace: int | None, page: int, dim: int, heads: int, group: int
) -> None:
    """Reported as sgl-project/sglang#1159, ROCm/aiter#2393."""
    lengths_q, lengths_k = [3, 1], [25, 38]
    blocks = sum(-(-n // page) for n in lengths_k) + 1
    table, slots = scattered(lengths_k, page, blocks, seed=5)
    random = torch.Generator().manual_seed(5)
    k_scale, v_scale = (torch.rand(shape, generator=random) * 0.02 + 0.01 for shape in ((blocks, heads), (heads,)))
    cache = poisoned(kg.PagedKVCache(
        blocks, page, heads, dim, scale=("per-page-head", "per-head"), k_scale=k_scale, v_scale=v_scale, device="cpu"
    ))  # fmt: skip
    keys, values = [], []
    for n, seq_slots in zip(lengths_k, slots, strict=True):
        k, v = torch.randn(2, n, heads, dim, generator=random)
        for backend, rows in (("torch", slice(0, n // 2)), ("triton", slice(n // 2, n))):
            cache.write(k[rows], v[rows], seq_slots[rows], backend=backend)
        keys.append(stored(k, k_scale[seq_slots // page][..., None], torch.float8_e4m3fn))
        values.append(stored(v, v_scale[:, None], torch.float8_e4m3fn))
    q = torch.randn(4, heads * group, dim, generator=random)
    batch = kg.PrefixBatch.build(table, offsets(lengths_q), offsets(lengths_k), page_size=page, num_blocks=blocks)
    out, lse = kg.prefix_attention(q, None, None, cache, batch, path=path, workspace_tokens=workspace, return_lse=True)
    wanted, wanted_lse = attention(q, keys, values, lengths_q)
    assert_near(out, wanted, 1e-5)
    assert_near(lse, wanted_lse, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("pool", [torch.float8_e4m3fn, torch.bfloat16, torch.float16], ids=str)
def test_the_direct_path_is_exact_in_the_interpreter(dtype: torch.dtype, tolerance: float, pool: torch.dtype) -> None:
    """Reported as triton-lang/triton#11584 and #10945: the interpreter multiplies the bits of BF16."""
    random = torch.Generator().manual_seed(6)
    scale = {"k_scale": 0.02, "v_scale": 0.02} if pool in FP8_MAX else {"scale": "none"}
    cache = kg.PagedKVCache(3, 16, 1, 32, dtype=pool, device="cpu", **scale)
    k, v = torch.randn(2, 40, 1, 32, generator=random)
    cache.write(k, v, torch.arange(40), backend="triton")
    q = torch.randn(20, 2, 32, generator=random).to(dtype)
    batch = kg.PrefixBatch.build(torch.tensor([[0, 1, 2]]), offsets([20]), offsets([40]), page_size=16, num_blocks=3)
    keys, values = (stored(x, 0.02, pool) for x in (k, v))
    wanted, wanted_lse = attention(q, [keys], [values], [20])
    out, lse = kg.prefix_attention(q, None, None, cache, batch, path="direct", return_lse=True)
    assert out.dtype == dtype
    assert_near(out, wanted, tolerance)
    assert_near(lse, wanted_lse, tolerance)


@each_path
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reduce_the_precision_of_a_path(
    path: str, workspace: int | None, autocast_dtype: torch.dtype
) -> None:  # fmt: skip
    """Reported as huggingface/diffusers#14104, pytorch/pytorch#126053.

    The dtype of q determines the precision, and the path affects the speed only: inside autocast, each path computes
    FP32 inputs in FP32.
    """
    random = torch.Generator().manual_seed(10)
    k, v = torch.randn(2, 40, 2, 16, generator=random)
    cache = kg.PagedKVCache(6, 16, 2, 16, dtype=torch.float32, device="cpu")
    cache.write(k, v, torch.arange(40))
    q = torch.randn(5, 4, 16, generator=random)
    batch = kg.PrefixBatch.build(torch.tensor([[0, 1, 2]]), offsets([5]), offsets([40]), page_size=16, num_blocks=6)
    with torch.autocast("cpu", dtype=autocast_dtype):
        out, lse = kg.prefix_attention(
            q, None, None, cache, batch, path=path, workspace_tokens=workspace, return_lse=True
        )
    wanted, wanted_lse = attention(q, [k], [v], [5])
    assert out.dtype == torch.float32
    assert_near(out, wanted, 1e-5)
    assert_near(lse, wanted_lse, 1e-5)


@pytest.mark.parametrize("path", ["gather", "direct"])
@pytest.mark.parametrize("view", ["fused", "heads outermost", "dims outermost"])
def test_q_k_and_v_of_any_strides(path: str, view: str) -> None:
    """Reported as ROCm/aiter#4531 and #2772: q, K and V are views of one projection."""
    random = torch.Generator().manual_seed(11)
    n, q_heads, heads, dim = 7, 4, 2, 16
    qkv = torch.randn(n, (q_heads + 2 * heads) * dim, generator=random)
    parts = qkv.split([q_heads * dim, heads * dim, heads * dim], -1)
    q, k, v = (part.view(n, -1, dim) for part in parts)
    wanted, _ = attention(q, [k], [v], [n])
    if view == "heads outermost":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    elif view == "dims outermost":
        q, k, v = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v))
    cache = poisoned(kg.PagedKVCache(6, 4, heads, dim, dtype=torch.float32, device="cpu"))
    batch = kg.PrefixBatch.build(torch.tensor([[3, 1]]), offsets([n]), offsets([n]), page_size=4, num_blocks=6)
    assert_near(kg.prefix_attention(q, k, v, cache, batch, path=path), wanted, 1e-5)
