"""Offsets past 2^31, where 32-bit arithmetic would wrap around: in the pool, between its heads, and in the rows.

Every 8 bytes of a pool hold their own number, counted from its first byte, so a gathered byte says where it was read.
On a GPU the memory is real and full. On a CPU it is only reserved: the system gives pages to what is touched, a few
blocks of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.device import has_gpu
from kvgather.formats.fp8 import decode
from kvgather.formats.layout import LAYOUTS, PoolStrides, Which, pool_shape
from tests.gather.oracle import first_difference
from tests.memory import memory
from tests.where import on_each_device

FP8 = torch.float8_e4m3fn
PAGE = 16
PAST = 2**31


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    yield
    if has_gpu():
        torch.cuda.empty_cache()


def codes_at(offsets: Tensor) -> Tensor:
    """The bytes at these offsets of memory whose every 8 bytes are their own number, little end first."""
    return ((offsets // 8) >> (8 * (offsets % 8))).to(torch.uint8)


def offsets_of(pool: Tensor, layout: str, which: Which, dim: int, block: Tensor, slot: Tensor) -> Tensor:
    """Where the elements of some tokens lie, `[n, heads, dim]`, from the pool's first element."""
    heads = pool.shape[2 if layout == "NHD" else 1]
    at = PoolStrides.of(pool, layout, which)
    return at.offset(
        block[:, None, None], torch.arange(heads)[None, :, None], slot[:, None, None], torch.arange(dim)[None, None]
    )


def make_pool(
    layout: str, which: Which, sizes: tuple[int, int, int], where: str, used: Tensor, outside: bool
) -> Tensor:
    """A pool of (blocks, heads, dim) in which bytes tell their place; `outside` puts the heads before the blocks."""
    blocks, heads, dim = sizes
    shape = list(pool_shape(layout, which, blocks, PAGE, heads, dim, 1))
    head_axis = (2 if layout == "NHD" else 1) if outside else 0
    shape.insert(0, shape.pop(head_axis))
    flat = memory(blocks * PAGE * heads * dim, FP8, where)
    pool = flat.view(shape).movedim(0, head_axis)
    if where == "cuda":
        torch.arange(flat.numel() // 8, out=flat.view(torch.int64))
        return pool
    slots = torch.arange(PAGE)
    for block in used.unique():
        offsets = offsets_of(pool, layout, which, dim, block.expand(PAGE), slots)
        flat.view(torch.uint8)[offsets.flatten()] = codes_at(offsets).flatten()
    return pool


def some_blocks(num_blocks: int, where: str, count: int) -> Tensor:
    """Ids at both ends of the pool, around 2^16 where it has so many, and others; more of them on a GPU."""
    ends = torch.tensor([num_blocks - 1, 0, min(2**16 - 1, num_blocks - 2), min(2**16, num_blocks - 3), num_blocks - 1])
    others = torch.randint(num_blocks, (count if where == "cuda" else 1,))
    return torch.cat((ends, others, ends[:1]))


def check_rows(rows: Tensor, offsets: Tensor, scale: Tensor | float) -> None:
    """Rows are what memory holds at these offsets, times the scale."""
    wanted = (decode(codes_at(offsets), FP8) * scale).to(rows.dtype)
    assert not first_difference(rows, wanted)


def sample(length: int, count: int = 400) -> Tensor:
    """Rows to compare: the first, the last, and others."""
    return torch.cat(
        (torch.arange(min(40, length)), torch.randint(length, (count,)), torch.arange(length - 40, length))
    )


def gather_and_check(layout: str, sizes: tuple[int, int, int], where: str, *, outside: bool) -> tuple[Tensor, Tensor]:
    """Gather some blocks of K and V, compare sampled rows, and return the pools."""
    blocks, heads, dim = sizes
    ids = some_blocks(blocks, where, 2000)
    length = len(ids) * PAGE - 5
    key = make_pool(layout, "key", sizes, where, ids, outside)
    value = make_pool(layout, "value", sizes, where, ids, outside)
    scale = 1 + torch.arange(blocks * heads).remainder(97).div(97).view(blocks, heads)
    table, offsets = ids[None].to(where), torch.tensor([0, length], device=where)
    plan = kg.GatherPlan.build(table, offsets, page_size=PAGE, num_blocks=blocks, total_tokens=length)
    k_scale = scale.to(where)
    if where == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    k, v = kg.gather(key, value, plan, layout=layout, k_scale=k_scale, backend="triton")
    if where == "cuda":
        assert (
            torch.cuda.max_memory_allocated() - before <= k.nbytes + v.nbytes + 2**22
        )  # no pool was copied; torch rounds up
    plan.check()
    rows = sample(length)
    block, slot = ids[rows // PAGE], rows % PAGE
    check_rows(k[rows.to(where)], offsets_of(key, layout, "key", dim, block, slot), scale[block][:, :, None])
    check_rows(v[rows.to(where)], offsets_of(value, layout, "value", dim, block, slot), 1.0)
    return key, value


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pool_of_more_than_2_31_elements(layout: str, where: str) -> None:
    blocks = PAST // (PAGE * 8 * 64) + 6
    key, value = gather_and_check(layout, (blocks, 8, 64), where, outside=False)
    assert key.numel() > PAST and value.numel() > PAST and blocks - 1 > 2**16


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_that_lie_more_than_2_31_elements_apart(layout: str, where: str) -> None:
    blocks = PAST // (PAGE * 64) + 3
    for pool in gather_and_check(layout, (blocks, 2, 64), where, outside=True):
        assert pool.stride(2 if layout == "NHD" else 1) > PAST


@on_each_device
def test_rows_past_2_31_elements(where: str) -> None:
    """On a GPU all of them are written; on a CPU the last page's alone, by a plan of one record."""
    heads, dim, blocks = 8, 64, 50
    length = PAST // (heads * dim) + 21
    key, value = (
        make_pool("NHD", which, (blocks, heads, dim), where, torch.arange(blocks), False) for which in ("key", "value")
    )
    columns = -(-length // PAGE)
    ids = torch.arange(columns) * 7 % blocks
    out = tuple(memory(length * heads * dim, torch.bfloat16, where).view(length, heads, dim) for _ in range(2))
    if where == "cuda":
        plan = kg.GatherPlan.build(
            ids[None].to(where), torch.tensor([0, length], device=where), page_size=PAGE, num_blocks=blocks,
            total_tokens=length,
        )  # fmt: skip
        rows = sample(length, 2000)
    else:
        last = (columns - 1) * PAGE
        plan = kg.GatherPlan.build(torch.tensor([[0]]), torch.tensor([0, 1]), page_size=PAGE, num_blocks=blocks)
        record = torch.tensor([[int(ids[-1]), last, length - last, 0]], dtype=torch.int32)
        plan = replace(plan, records=record, total_tokens=length)
        rows = torch.arange(last, length)
    k, v = kg.gather(key, value, plan, k_scale=0.5, v_scale=2.0, out=out, backend="triton")
    assert k.numel() > PAST
    block, slot = ids[rows // PAGE], rows % PAGE
    check_rows(k[rows.to(where)], offsets_of(key, "NHD", "key", dim, block, slot), 0.5)
    check_rows(v[rows.to(where)], offsets_of(value, "NHD", "value", dim, block, slot), 2.0)


@on_each_device
def test_output_heads_that_lie_more_than_2_31_elements_apart(where: str) -> None:
    heads, dim, blocks, length = 2, 64, 9, 100
    key, value = (
        make_pool("HND", which, (blocks, heads, dim), where, torch.arange(blocks), False) for which in ("key", "value")
    )
    ids = torch.arange(7).flip(0)
    table, offsets = ids[None].to(where), torch.tensor([0, length], device=where)
    plan = kg.GatherPlan.build(table, offsets, page_size=PAGE, num_blocks=blocks, total_tokens=length)
    capacity = PAST // dim + 1
    out = [memory(heads * capacity * dim, torch.bfloat16, where).view(heads, capacity, dim) for _ in range(2)]
    k, v = kg.gather(key, value, plan, layout="HND", out=[rows.transpose(0, 1) for rows in out], backend="triton")
    assert k.stride(1) > PAST
    rows = torch.arange(length)
    check_rows(k[:length], offsets_of(key, "HND", "key", dim, ids[rows // PAGE], rows % PAGE), 1.0)
    check_rows(v[:length], offsets_of(value, "HND", "value", dim, ids[rows // PAGE], rows % PAGE), 1.0)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("there", [0, 1])
def test_the_pools_gpu_need_not_be_the_current_one(there: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and this machine has one")
    where = f"cuda:{there}"
    pool = torch.arange(3 * PAGE * 8, device=where, dtype=torch.float32).view(3, PAGE, 1, 8)
    table, offsets = torch.tensor([[2, 0]], device=where), torch.tensor([0, 20], device=where)
    with torch.cuda.device(1 - there):
        plan = kg.GatherPlan.build(table, offsets, page_size=PAGE, num_blocks=3, total_tokens=20)
        k, v = kg.gather(pool, pool, plan, out_dtype=torch.float32)
    assert k.device == v.device == pool.device
    assert torch.equal(k, torch.cat((pool[2], pool[0, :4]))) and torch.equal(k, v)
