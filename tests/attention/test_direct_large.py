"""The direct kernel where offsets inside a block pass 2^31: one slot of a block, or one dim, far behind the other.

On a CPU the memory is reserved, and hardly any of it used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention.direct import DirectCall, DirectLaunch, Tile, direct_attention
from kvgather.attention.reference import reference_attention
from kvgather.blocks import cu_seqlens
from kvgather.device import has_gpu
from tests.attention.batches import assert_close
from tests.gather.test_large import memory
from tests.where import CPU, GPU

pytestmark = pytest.mark.triton
FP8 = torch.float8_e4m3fn
PAGE, DIM, BLOCKS = 16, 16, 9_000_000  # slots are BLOCKS × DIM apart: the last of a page is 2.16e9 behind the first
WIDE = {"key": (True, False), "value": (False, True), "both": (True, True), "neither": (False, False)}


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    yield
    if has_gpu():
        torch.cuda.empty_cache()


def wide_pool(where: str) -> Tensor:
    """`[BLOCKS, PAGE, 1, DIM]`, slots outermost in memory."""
    return memory(BLOCKS * PAGE * DIM, FP8, where).view(PAGE, BLOCKS, 1, DIM).transpose(0, 1)


def wide_cache(wide: tuple[bool, bool], where: str, blocks: int = BLOCKS) -> kg.PagedKVCache:
    pools = [
        wide_pool(where) if far else memory(blocks * PAGE * DIM, FP8, where).view(blocks, PAGE, 1, DIM) for far in wide
    ]
    return kg.PagedKVCache.from_tensors(pools[0], pools[1], layout="NHD", k_scale=0.5, v_scale=0.25)


def constants(cache: kg.PagedKVCache, batch: kg.PrefixBatch, q: Tensor) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return DirectLaunch(DirectCall(q, cache, batch, None, None, None, None, Tile(16, 16, 4, 2, 1), True, 0)).constants


@pytest.mark.parametrize("which", WIDE)
def test_the_kernel_is_told_so(which: str) -> None:
    """Nothing is launched, and no memory is used."""
    cache, offsets = wide_cache(WIDE[which], "cpu"), torch.zeros(2, dtype=torch.int32)
    batch = kg.PrefixBatch.build(
        offsets[None, :1], offsets, offsets, page_size=PAGE, num_blocks=BLOCKS, total_q=1, total_k=1
    )
    told = constants(cache, batch, torch.zeros(1, 2, DIM))
    assert (told["K"].wide, told["V"].wide) == WIDE[which]


@pytest.mark.parametrize("where", [CPU, GPU])
@pytest.mark.parametrize("which", ["key", "value", "both"])
def test_slots_that_are_far_apart(which: str, where: str) -> None:
    cache = wide_cache(WIDE[which], where)
    new, total = [2, 1], [37, 16]
    table = torch.tensor([[BLOCKS - 1, 0, 5_000_000], [BLOCKS - 2, -1, -1]], device=where)
    offsets, sizes = (cu_seqlens(new, where), cu_seqlens(total, where)), {"page_size": PAGE, "num_blocks": BLOCKS}
    batch = kg.PrefixBatch.build(table, *offsets, seqlens_q=new, seqlens_k=total, **sizes)
    every = kg.PrefixBatch.build(table, offsets[1], offsets[1], total_q=53, total_k=53, **sizes)
    cache.write(*(torch.randn(53, 1, DIM, device=where) for _ in range(2)), every.slots)
    q = torch.randn(3, 2, DIM, dtype=torch.float32 if where == "cpu" else torch.bfloat16, device=where)
    told = constants(cache, batch, q)
    assert (told["K"].wide, told["V"].wide) == WIDE[which], "else the interpreter would read outside the pool"
    got = direct_attention(q, cache, batch, softmax_scale=0.25)
    rows = cache.gather(every.plan, out_dtype=torch.float32)
    assert_close(got, reference_attention(q, *rows, *offsets, softmax_scale=0.25))
