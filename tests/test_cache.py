"""The cache: what a write leaves behind, slot by slot, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import POOL_STYLES, Case, build
from kvgather.formats.fp8 import FORMATS, POOL_DTYPES, SCALE_FLOOR, computed_scale, quantize
from kvgather.formats.layout import LAYOUTS, element_offset
from kvgather.formats.scale import KINDS
from kvgather.scatter import SlotError
from tests.gather.oracle import BITS, first_difference, scale_at
from tests.where import interpreted, nothing_waits, on_each_device

KIND_PAIRS = [(KINDS[i], KINDS[(i + 1) % 5]) for i in (0, 2, 4)]  # each kind at least once
SLOTS = [17, -1, 40, 5]


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


@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_a_write_equals_the_obvious_loop(case: Case) -> None:
    k, v = (awkward(4, case.num_heads, dim, "cpu") for dim in (case.k_dim, case.v_dim))
    caches = [build(case, seed=4).cache for _ in range(2)]
    caches[0].write(k, v, torch.tensor(SLOTS), backend="torch")
    obvious_write(caches[1], k, v, SLOTS)
    assert_same_contents(contents(caches[0]), contents(caches[1]))


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


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_slots_that_a_cpu_refuses(backend: str) -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, device="cpu")
    k = torch.ones(3, 1, 8)
    for slots, message in (
        ([0, 8, -1], r"slots\[1\] is 8; accepted: below 8, the slots of the cache, or negative for padding"),
        ([2**40, 0, 1], r"slots\[0\] is 1099511627776; accepted: below 8"),
        ([5, -1, 5], r"slots\[0\] and slots\[2\] are both 5; accepted: each slot once"),
    ):
        with pytest.raises(SlotError, match=message):
            cache.write(k, k, torch.tensor(slots), backend=backend)
    assert not bool(cache.key_cache.view(torch.uint8).any())
    cache.check()


@on_each_device
def test_padding_is_skipped(where: str) -> None:
    for backend in ("triton", "torch"):
        cache = kg.PagedKVCache(2, 4, 1, 8, scale="per-token-head", device=where)
        k = torch.ones(4, 1, 8, device=where)
        cache.write(k, k, torch.tensor([-1, -1, -(2**31), -5], dtype=torch.int32, device=where), backend=backend)
        cache.write(k[:0], k[:0], torch.tensor([], dtype=torch.int64, device=where), backend=backend)
        assert not bool(cache.key_cache.view(torch.uint8).any() | cache.value_cache.view(torch.uint8).any())
        assert cache.k_scale is not None and bool((cache.k_scale == 1).all())
        cache.check()


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_was_written_comes_back_within_half_a_step(layout: str, dtype: torch.dtype) -> None:
    cache = kg.PagedKVCache(3, 16, 2, 32, 16, layout, dtype, "per-token-head", device="cpu")
    k, v = torch.randn(20, 2, 32), torch.randn(20, 2, 16)
    slots = torch.tensor([2 * 16 + i for i in range(16)] + [0, 1, 2, 3])
    cache.write(k, v, slots)
    plan = kg.GatherPlan.build(torch.tensor([[2, 0]]), torch.tensor([0, 20]), page_size=16, num_blocks=3)
    fmt = FORMATS[dtype]
    for got, given in zip(cache.gather(plan, out_dtype=torch.float32), (k, v), strict=True):
        step = 2.0 ** -(fmt.mantissa_bits + 1)
        smallest = fmt.min_normal / 2 ** (fmt.mantissa_bits + 1) * computed_scale(given, dtype)[..., None]
        assert bool(((got - given).abs() <= torch.maximum(given.abs() * step, smallest) * (1 + 1e-6)).all())
        assert bool((got != given).any())


def test_scales_of_written_tokens_are_stored_and_others_stay_one() -> None:
    given = torch.tensor([2.0, 4.0])
    cache = kg.PagedKVCache(2, 4, 2, 8, scale=("per-token-head", "per-head"), v_scale=given, device="cpu")
    k = torch.zeros(1, 2, 8)
    k[0, 0, 3], k[0, 1, 5] = -896.0, 44.8
    cache.write(k, k, torch.tensor([6]))
    assert cache.k_scale is not None and cache.v_scale is not None
    assert cache.k_scale[1, :, 2].tolist() == pytest.approx([2.0, 0.1])
    assert float(cache.k_scale.sum()) == pytest.approx(14 + 2.1)
    assert cache.v_scale.tolist() == [2.0, 4.0]
    assert cache.key_cache[1, 2, 0, 3].item() == -448.0
    assert cache.value_cache[1, 2, :, 5].tolist() == [0.0, 11.0]  # 44.8 / 4, rounded


def test_from_tensors_shares_memory() -> None:
    k, v, scale = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8), torch.ones(2, 1, 4)
    cache = kg.PagedKVCache.from_tensors(k, v, layout="NHD", k_scale=scale, v_scale=0.5)
    assert cache.key_cache is k and cache.value_cache is v and cache.k_scale is scale
    assert (cache.k_kind, cache.v_kind) == ("per-token-head", "per-tensor")
    cache.write(torch.full((1, 1, 8), 3.0), torch.ones(1, 1, 8), torch.tensor([5]))
    assert k[1, 1].tolist() == [[1.0] * 8] and scale[1, 0, 1] == 3.0
    assert v[1, 1].tolist() == [[2.0] * 8]  # divided by the float


def test_gradients_do_not_follow_into_the_cache() -> None:
    cache = kg.PagedKVCache(1, 4, 1, 8, dtype=torch.float32, scale="none", device="cpu")
    k = torch.ones(1, 1, 8, requires_grad=True)
    for backend in ("torch", "auto"):
        cache.write(k * 2, k * 2, torch.tensor([0]), backend=backend)
    assert not cache.key_cache.requires_grad
    assert cache.key_cache[0, 0].tolist() == [[2.0] * 8]


def test_an_empty_cache() -> None:
    cache = kg.PagedKVCache(num_blocks=4, page_size=16, num_kv_heads=2, head_dim=32, v_head_dim=16, device="cpu")
    assert (cache.layout, cache.k_kind, cache.v_kind, cache.num_slots) == ("NHD", "per-tensor", "per-tensor", 64)
    assert cache.k_scale is not None and cache.k_scale.tolist() == [1.0]
    assert cache.key_cache.shape == (4, 16, 2, 32) and cache.value_cache.shape == (4, 16, 2, 16)
    assert repr(cache) == (
        "PagedKVCache(4 blocks × 16 tokens × 2 heads × 32/16, NHD, torch.float8_e4m3fn, per-tensor, cpu)"
    )
    for kind, shape in (("per-head", (2,)), ("per-page-head", (4, 2)), ("per-token-head", (4, 2, 16))):
        scaled = kg.PagedKVCache(4, 16, 2, 32, scale=("none", kind), device="cpu")
        assert scaled.k_scale is None and scaled.v_scale is not None and scaled.v_scale.shape == shape
        assert bool((scaled.v_scale == 1).all())
    assert kg.PagedKVCache(0, 16, 2, 32, scale="per-token-head", device="cpu").num_slots == 0


def test_check_reads_every_scale() -> None:
    cache = kg.PagedKVCache(2, 4, 1, 8, scale="per-token-head", device="cpu")
    cache.check()
    assert cache.v_scale is not None
    cache.v_scale[1, 0, 2] = math.nan
    with pytest.raises(ValueError, match=r"v_scale is nan at \[1, 0, 2\]; accepted: finite values above 0"):
        cache.check()


GOOD: dict[str, Any] = {"num_blocks": 2, "page_size": 16, "num_kv_heads": 2, "head_dim": 16, "device": "cpu"}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"num_blocks": -1}, ValueError, r"num_blocks is -1; accepted: 0 to"),
        ({"page_size": 0}, ValueError, r"page_size is 0; accepted: 1 to"),
        ({"num_kv_heads": 2.5}, TypeError, r"num_kv_heads is float 2.5; accepted: an int"),
        ({"head_dim": "64"}, TypeError, r"head_dim is str '64'; accepted: an int"),
        ({"v_head_dim": 0}, ValueError, r"v_head_dim is 0; accepted: 1 to"),
        ({"layout": "BHND"}, ValueError, r"layout is 'BHND'; accepted: NHD, HND, SHUFFLE"),
        ({"layout": "SHUFFLE", "page_size": 8}, ValueError, r"page_size is 8; accepted in SHUFFLE"),
        ({"layout": "SHUFFLE", "head_dim": 40}, ValueError, r"head_dim is 40; accepted in SHUFFLE"),
        ({"dtype": torch.int8}, TypeError, r"dtype .*int8.*; accepted: float8_e4m3fn"),
        ({"dtype": "float8_e4m3fn"}, TypeError, r"dtype .*'float8_e4m3fn'; accepted"),
        ({"scale": "per-block"}, ValueError, r"scale is 'per-block'; accepted: none, per-tensor"),
        ({"scale": ("none", "per-row")}, ValueError, r"scale\[1\] is 'per-row'; accepted"),
        ({"scale": ("none",)}, TypeError, r"scale is tuple \('none',\); accepted: a kind, or a pair"),
        ({"scale": None}, TypeError, r"scale is NoneType None; accepted"),
        ({"scale": "none", "k_scale": 1.0}, ValueError, r"k_scale was given; accepted for kind none: None"),
        (
            {"scale": "per-head", "v_scale": torch.ones(3)},
            ValueError,
            r"v_scale has shape \[3\]; .* as per-head: \[2\]",
        ),
        ({"k_scale": -1.0}, ValueError, r"k_scale is -1.0; accepted: finite values above 0"),
        ({"device": "gpu"}, ValueError, r"device is 'gpu'; accepted: a torch.device or its name: cpu, cuda"),
        ({"device": "cuda:77"}, ValueError, r"device is cuda:77, and torch sees \d GPUs here; accepted"),
        ({"device": 1.5}, TypeError, r"device is float 1.5; accepted"),
    ],
)
def test_wrong_sizes(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    kg.PagedKVCache(**GOOD)
    with pytest.raises(error, match=message):
        kg.PagedKVCache(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"k": torch.ones(2, 2, 16, dtype=torch.int32)},
            TypeError,
            r"k has dtype int32; accepted: bfloat16, float16, fl",
        ),
        ({"k": torch.ones(2, 2, 16).to(torch.float8_e4m3fn)}, TypeError, r"k has dtype float8_e4m3fn; accepted"),
        ({"v": torch.ones(2, 2, 16)}, ValueError, r"v has shape \[2, 2, 16\]; accepted: \[n, 2, 24\]"),
        ({"k": torch.ones(2, 1, 16)}, ValueError, r"k has shape \[2, 1, 16\]; accepted: \[n, 2, 16\]"),
        ({"k": torch.ones(2, 32)}, ValueError, r"k has shape \[2, 32\]; accepted: 3 dimensions"),
        ({"v": None}, TypeError, r"v is NoneType None; accepted: a torch.Tensor"),
        ({"k": torch.ones(3, 2, 16)}, ValueError, r"k, v and slots have 3, 2 and 2 tokens; accepted: equal numbers"),
        ({"slots": torch.tensor([0])}, ValueError, r"k, v and slots have 2, 2 and 1 tokens"),
        ({"slots": [0, 1]}, TypeError, r"slots is list \[0, 1\]; accepted: a torch.Tensor"),
        ({"slots": torch.tensor([0.0, 1.0])}, TypeError, r"slots has dtype float32; accepted: int32, int64"),
        ({"slots": torch.tensor([[0, 1]])}, ValueError, r"slots has shape \[1, 2\]; accepted: 1 dimensions"),
        ({"slots": torch.tensor([0, 1]).to("meta")}, ValueError, r"slots is on meta; accepted: cpu"),
        ({"k": torch.ones(2, 2, 16).to("meta")}, ValueError, r"k is on meta; accepted: cpu"),
        ({"backend": "numpy"}, ValueError, r"backend is 'numpy'; accepted: auto, triton, torch"),
        (
            {"k": torch.ones(0, 2, 16), "v": torch.ones(0, 2, 24), "slots": torch.ones(0, dtype=torch.int32),
             "backend": None},
            TypeError, r"backend is NoneType None; accepted: auto, triton, torch",
        ),
    ],
)  # fmt: skip
def test_wrong_writes(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    cache = kg.PagedKVCache(**{**GOOD, "v_head_dim": 24, "scale": "per-token-head"})
    before = contents(cache)
    good: dict[str, Any] = {"k": torch.ones(2, 2, 16), "v": torch.ones(2, 2, 24), "slots": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        cache.write(**{**good, **wrong})
    assert_same_contents(contents(cache), before)
    cache.write(**good)
    assert any(bool((a.view(BITS[a.element_size()]) != b.view(BITS[b.element_size()])).any())
               for a, b in zip(contents(cache), before, strict=True))  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_elements_that_lie_on_each_other_can_be_read_and_not_written(backend: str) -> None:
    pool, shared = torch.ones(1, 4, 1, 8), torch.ones(2, 1, 4)
    once = pool.expand(2, 4, 1, 8)
    token = torch.ones(1, 1, 8)
    for tensors, scales, message in (
        ((once, once.clone()), (None, None), r"key_cache has strides \[0, .*; accepted by write: elements that do not"),
        ((once.clone(), once), (None, None), r"value_cache has strides"),
        ((once.clone(), once.clone()), (shared[:1, :, :1].expand(2, 1, 4), None), r"k_scale has strides"),
        ((once.clone(), once.clone()), (shared, shared), r"v_scale shares memory with k_scale; accepted by write: mem"),
        ((shared.view(2, 4, 1, 1), shared.view(2, 4, 1, 1)), (None, None), r"value_cache shares memory with key_cache"),
    ):
        cache = kg.PagedKVCache.from_tensors(*tensors, layout="NHD", k_scale=scales[0], v_scale=scales[1])
        plan = kg.GatherPlan.build(torch.tensor([[1]]), torch.tensor([0, 4]), page_size=4, num_blocks=2)
        assert bool((cache.gather(plan)[0] == 1).all())
        rows = token[..., : cache.geometry.head_dim]
        with pytest.raises(ValueError, match=message):
            cache.write(rows, rows, torch.tensor([0]), backend=backend)


@interpreted
@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
def test_a_write_that_is_known_is_the_same(kind: str) -> None:
    """Other rows, lengths and slots go through the launch of an earlier write, and what it holds is theirs."""
    caches = [kg.PagedKVCache(4, 4, 2, 16, layout="HND", scale=kind, device="cpu") for _ in range(2)]
    for turn, tokens in enumerate((3, 5, 1, 3)):
        k, v = torch.randn(2, tokens, 2, 16)
        slots = (torch.randperm(16)[:tokens] - int(turn == 2)).int()
        for cache, backend in zip(caches, ("triton", "torch"), strict=True):
            cache.write(k, v, slots, backend=backend)
        for ours, theirs in ((c.key_cache, d.key_cache) for c, d in [caches]):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert torch.equal(caches[0].value_cache.view(torch.uint8), caches[1].value_cache.view(torch.uint8))
        assert torch.equal(caches[0].v_scale, caches[1].v_scale)
    assert len(caches[0]._write_launches) == 1


@interpreted
def test_a_known_write_drops_no_check() -> None:
    cache = kg.PagedKVCache(4, 4, 2, 16, device="cpu")
    k, v, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([1, 5, 9])
    cache.write(k, v, slots, backend="triton")
    before = cache.key_cache.clone()
    short = torch.randn(3, 2, 16)
    short.untyped_storage().resize_(short.untyped_storage().nbytes() - 1)
    for change, message in (
        ({"k": k[:2]}, r"k, v and slots have 2, 3 and 3 tokens"),
        ({"v": v[:, :1]}, r"v has shape \[3, 1, 16\]; accepted: \[n, 2, 16\]"),
        ({"v": v.int()}, r"v has dtype int32; accepted: bfloat16"),
        ({"k": short}, r"k with shape .* reaches byte"),
        ({"slots": slots.short()}, r"slots has dtype int16; accepted: int32, int64"),
        ({"slots": torch.tensor([1, 16, 2])}, r"slots\[1\] is 16; accepted: below 16"),
        ({"slots": torch.tensor([1, 2, 1])}, r"slots\[0\] and slots\[2\] are both 1"),
        ({"slots": None}, r"slots is NoneType None; accepted: a torch.Tensor"),
        ({"backend": "cuda"}, r"backend is 'cuda'; accepted"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cache.write(**{"k": k * 2, "v": v, "slots": slots, "backend": "triton", **change})
    assert torch.equal(cache.key_cache.view(torch.uint8), before.view(torch.uint8))
    memory = cache.value_cache.untyped_storage()
    memory.resize_(memory.nbytes() - 1)
    with pytest.raises(ValueError, match=r"value_cache with shape .* reaches byte"):
        cache.write(k, v, slots, backend="triton")


@interpreted
def test_a_known_write_goes_where_the_pool_is_now() -> None:
    cache = kg.PagedKVCache(4, 4, 2, 16, dtype=torch.float32, scale="none", device="cpu")
    k, v, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([1, 5, 9])
    cache.write(k, v, slots, backend="triton")
    (known,) = cache._write_launches.values()
    old, new, launch = cache.key_cache.clone(), torch.zeros_like(cache.key_cache), known[0]
    before = torch.empty(0).set_(cache.key_cache)
    cache.key_cache.set_(new)  # an engine that wakes up
    cache.write(k * 2, v, slots, backend="triton")
    assert torch.equal(before, old) and torch.equal(new.view(16, 2, 16)[slots], k * 2)
    (known,) = cache._write_launches.values()
    assert launch not in known  # it has the address of the old memory, to which a GPU would write


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_rows_that_are_a_view_of_the_pool(backend: str) -> None:
    """Tokens that move from slot to slot inside a pool are read before they are written."""
    cache = kg.PagedKVCache(2, 4, 1, 8, dtype=torch.float32, scale="none", device="cpu")
    cache.key_cache.copy_(torch.arange(64.0).view(2, 4, 1, 8))
    for _ in range(2):
        wanted = cache.key_cache.view(8, 1, 8)[:6].clone()
        cache.write(cache.key_cache.view(8, 1, 8)[:6], torch.zeros(6, 1, 8), torch.arange(1, 7), backend=backend)
        assert torch.equal(cache.key_cache.view(8, 1, 8)[1:7], wanted)


def test_pools_and_scales_that_share_memory_in_part() -> None:
    memory = torch.zeros(100)
    k, v, slots = torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.tensor([0])
    pools = [memory[i : i + 32].view(2, 4, 1, 4) for i in (0, 31, 32)]
    with pytest.raises(ValueError, match=r"value_cache shares memory with key_cache; accepted by write"):
        kg.PagedKVCache.from_tensors(pools[0], pools[1], layout="NHD").write(k, v, slots)
    scale = memory[60:68].view(2, 1, 4)
    scale.fill_(1)
    cache = kg.PagedKVCache.from_tensors(pools[0], pools[2], layout="NHD", k_scale=scale)
    with pytest.raises(ValueError, match=r"k_scale shares memory with value_cache; accepted by write"):
        cache.write(k, v, slots)
    packed = memory[:64].view(2, 2, 4, 1, 4)  # K and V of a block side by side
    cache = kg.PagedKVCache.from_tensors(packed[:, 0], packed[:, 1], layout="NHD")
    cache.write(k, v * 2, slots)
    assert packed[0, :, 0].unique().tolist() == [1.0, 2.0]


@pytest.mark.gpu
def test_a_slot_that_comes_twice_is_found_by_check() -> None:
    cache = kg.PagedKVCache(4, 4, 2, 16, device="cuda")
    rows = torch.randn(3, 2, 16, device="cuda")
    cache.write(rows, rows, torch.tensor([1, -1, -1], device="cuda"))
    cache.check()
    cache.write(rows, rows, torch.tensor([1, 2, 1], device="cuda"))
    with pytest.raises(SlotError, match=r"slots\[0\] and slots\[2\] are both 1; accepted: each slot once"):
        cache.check()
