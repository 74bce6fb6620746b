"""The write's kernel: it writes what plain torch writes, and stays inside the pool whatever the slots are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvgather as kg
from kvgather.cases import Case, build
from kvgather.formats.fp8 import FORMATS
from kvgather.formats.layout import LAYOUTS
from kvgather.lab.trace import trace
from kvgather.scatter import SlotError
from tests.gather.oracle import first_difference
from tests.scatter.writes import SLOTS, WRITES, assert_same_contents, awkward, contents
from tests.where import interpreted, nothing_waits, on_each_device


@on_each_device
@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_the_kernel_writes_what_torch_writes(case: Case, where: str) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float16)[len(case.name) % 3]
    k, v = (awkward(4, case.num_heads, dim, where, dtype) for dim in (case.k_dim, case.v_dim))
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=where)
    caches = [build(case, where, seed=4).cache for _ in range(2)]
    for cache, backend in zip(caches, ("triton", "torch"), strict=True):
        cache.write(k, v, slots, backend=backend)
    assert_same_contents(contents(caches[0]), contents(caches[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_a_gpu_writes_what_a_cpu_writes(case: Case) -> None:
    cpu, gpu = build(case, "cpu").cache, build(case, "cpu").cache
    moved = kg.PagedKVCache.from_tensors(
        gpu.key_cache.cuda(), gpu.value_cache.cuda(), layout=case.layout, k_kind=case.k_kind, v_kind=case.v_kind,
        k_scale=None if gpu.k_scale is None else gpu.k_scale.cuda(),
        v_scale=None if gpu.v_scale is None else gpu.v_scale.cuda(),
    )  # fmt: skip
    k, v = (awkward(4, case.num_heads, dim, "cpu") for dim in (case.k_dim, case.v_dim))
    cpu.write(k, v, torch.tensor(SLOTS))
    moved.write(k.cuda(), v.cuda(), torch.tensor(SLOTS).cuda())
    assert_same_contents(contents(moved), contents(cpu))


@on_each_device
def test_every_finite_code_and_every_tie_through_the_kernel(where: str) -> None:
    for dtype in FORMATS:
        table = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        finite = table[table.isfinite()].sort().values
        middles = (finite[1:] + finite[:-1]) / 2
        values = torch.cat((finite, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), finite * 1.01))
        values = torch.nn.functional.pad(values, (0, -len(values) % 8))
        values = values.view(1, -1, 8).to(where)
        codes = []
        for backend in ("triton", "torch"):
            cache = kg.PagedKVCache(1, 1, values.shape[1], 8, dtype=dtype, scale="none", device=where)
            cache.write(values, values, torch.tensor([0], device=where), backend=backend)
            codes.append(cache.key_cache)
        assert not first_difference(codes[0], codes[1])


@on_each_device
def test_strided_k_v_and_slots(where: str) -> None:
    for backend in ("triton", "torch"):
        qkv = awkward(4, 6, 16, where, torch.bfloat16)
        k, v = qkv[:, 1:3], qkv[:, 4:6]
        slots = torch.tensor([3, 99, 7, 99, -2, 99, 12, 99], device=where)[::2]
        caches = [kg.PagedKVCache(2, 16, 2, 16, scale="per-token-head", device=where) for _ in range(2)]
        caches[0].write(k, v, slots, backend=backend)
        caches[1].write(k.contiguous(), v.contiguous(), slots.contiguous(), backend="torch")
        assert_same_contents(contents(caches[0]), contents(caches[1]))
        k = qkv.permute(0, 2, 1)[:, :2, :6].permute(0, 2, 1)  # dims are not neighbours
        narrow = [kg.PagedKVCache(2, 16, 6, 2, scale="none", device=where) for _ in range(2)]
        narrow[0].write(k, k, slots, backend=backend)
        narrow[1].write(k.contiguous(), k.contiguous(), slots, backend="torch")
        assert_same_contents(contents(narrow[0]), contents(narrow[1]))


@pytest.mark.gpu
@pytest.mark.triton
def test_a_write_neither_waits_nor_needs_new_memory_in_a_graph() -> None:
    cache = kg.PagedKVCache(2, 4, 2, 16, scale="per-token-head", device="cuda")
    k = torch.randn(3, 2, 16, device="cuda")
    slots = torch.tensor([0, 5, -1], device="cuda")
    cache.write(k, k, slots)
    with nothing_waits():
        cache.write(k, k, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(k, k, slots)
    k.copy_(torch.randn(3, 2, 16))
    slots.copy_(torch.tensor([7, -1, 1]))
    graph.replay()
    other = kg.PagedKVCache(2, 4, 2, 16, scale="per-token-head", device="cuda")
    other.write(k, k, slots, backend="torch")
    for ours, theirs in zip(contents(cache), contents(other), strict=True):
        index = (1, 3) if ours.ndim == 4 else (1, slice(None), 3)
        assert not first_difference(ours[index], theirs[index])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_gpu_skips_slots_past_the_pool_and_check_raises(backend: str) -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, scale="per-token-head", device="cuda")
    before = contents(cache)
    k = torch.ones(3, 1, 8, device="cuda")
    cache.write(k, k, torch.tensor([8, 2**40, 11], device="cuda"), backend=backend)
    assert_same_contents(contents(cache), before)
    with pytest.raises(SlotError, match=r"slots has 1099511627776; accepted: below 8, or negative for padding"):
        cache.check()


def written(cache: kg.PagedKVCache, slots: list[int], dtype: torch.dtype = torch.int64) -> tuple[Any, int]:
    """Launch the kernel with these slots under the trace; the report, and the largest slot that was refused."""
    from kvgather.scatter.kernel import ScatterLaunch

    g = cache.geometry
    k = torch.ones(len(slots), g.num_kv_heads, g.head_dim)
    v = torch.ones(len(slots), g.num_kv_heads, g.v_head_dim)
    at, too_large = torch.tensor(slots, dtype=dtype), torch.tensor([-1])
    launch = ScatterLaunch(cache.key_cache, cache.value_cache, g, cache.scales, k, v, at, too_large)
    with trace(strict=True) as report:
        launch(k, v, at)
    return report, int(too_large)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
@pytest.mark.parametrize("past", [0, 1, 5, 2**40])
def test_slots_past_the_pool_are_skipped_and_kept(layout: str, kind: str, past: int) -> None:
    """The first slot past the pool is the one that `>` for `>=` would write."""
    cache = kg.PagedKVCache(3, 16, 2, 16, layout=layout, scale=kind, device="cpu")
    last = cache.num_slots - 1
    report, refused = written(cache, [last, cache.num_slots + past, -1, 0])
    assert not report.violations, report
    assert refused == cache.num_slots + past
    for slot in (last, 0):
        plan = kg.GatherPlan.build(
            torch.tensor([[slot // 16]]), torch.tensor([0, 1]), page_size=16, num_blocks=3,
            seq_starts=torch.tensor([slot % 16]),
        )  # fmt: skip
        assert all(bool((rows.float() - 1).abs().max() < 0.1) for rows in cache.gather(plan))


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_writes_nothing(dtype: torch.dtype) -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, device="cpu")
    report, refused = written(cache, [-1, -(2**31), -7], dtype)
    assert not report.violations and refused == -1
    assert not cache.key_cache.view(torch.uint8).any() and not cache.value_cache.view(torch.uint8).any()
