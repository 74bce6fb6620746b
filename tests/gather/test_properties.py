"""Random geometries, batches and mistakes: Triton equals the reference, and what is wrong is said to be wrong."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvgather as kg
from kvgather.cases import POOL_STYLES, Case, build
from kvgather.device import interpreting
from kvgather.formats.fp8 import FLOATS, POOL_DTYPES
from kvgather.formats.layout import LAYOUTS, Geometry, group
from kvgather.formats.scale import KINDS
from tests.gather.oracle import assert_same, first_difference, gather_rows, untouched
from tests.where import on_each_device

examples = settings(
    max_examples=30 if interpreting() else 15,  # on a GPU each compiles kernels of its own
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(POOL_DTYPES))
    x = group(dtype.itemsize) if layout == "SHUFFLE" else 1
    page = draw(st.integers(1, 40 // x)) * x
    k_dim = draw(st.integers(1, 48 // x)) * x
    v_dim = draw(st.one_of(st.just(k_dim), st.integers(1, 48)))
    lengths = tuple(draw(st.lists(st.integers(0, 2 * page), max_size=3)))
    starts = draw(st.one_of(st.just(()), st.tuples(*(st.integers(0, 3 * page) for _ in lengths))))
    kinds = draw(st.one_of(st.just(("none", "none")), st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS))))
    out_dtypes = (*FLOATS, dtype) if kinds == ("none", "none") else FLOATS
    return Case(
        layout=layout,
        dtype=dtype,
        k_kind=kinds[0],
        v_kind=kinds[1],
        out_dtype=draw(st.sampled_from(out_dtypes)),
        page_size=page,
        num_heads=draw(st.integers(1, 5)),
        k_dim=k_dim,
        v_dim=v_dim,
        lengths=lengths,
        starts=starts,
        spare_rows=draw(st.integers(0, page)),
        num_blocks=draw(st.integers(0, 4)),
        pool_style=draw(st.sampled_from(POOL_STYLES)),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
    )


@on_each_device
@examples
@given(case=cases(), seed=st.integers(0, 9))
def test_kernel_equals_reference(where: str, case: Case, seed: int) -> None:
    built = build(case, where, seed)
    outs = []
    for backend in ("triton", "torch"):
        k_out, v_out = (
            untouched((case.total_tokens, case.num_heads, dim), case.out_dtype, where)
            for dim in (case.k_dim, case.v_dim)
        )
        built.cache.gather(built.plan, out_dtype=case.out_dtype, out=(k_out, v_out), backend=backend)
        outs.append((k_out, v_out))
    assert_same(*outs)
    built.plan.check()


@on_each_device
@examples
@given(case=cases(), seed=st.integers(0, 9), tokens=st.integers(1, 5), dtype=st.sampled_from(FLOATS))
def test_written_by_the_kernel_as_by_torch(where: str, case: Case, seed: int, tokens: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(seed)
    caches = [build(case, where, seed).cache for _ in range(2)]
    slots = torch.randperm(caches[0].num_slots, generator=random)[:tokens]
    slots[torch.rand(len(slots), generator=random) < 0.2] = -1
    k, v = (
        torch.randn(len(slots), case.num_heads, dim, generator=random) * 2.0 ** float(seed * 3 - 12)
        for dim in (case.k_dim, case.v_dim)
    )
    for cache, backend in zip(caches, ("triton", "torch"), strict=True):
        cache.write(k.to(where, dtype), v.to(where, dtype), slots.to(where), backend=backend)
    for name in ("key_cache", "value_cache", "k_scale", "v_scale"):
        ours, theirs = (getattr(cache, name) for cache in caches)
        assert (ours is None) == (theirs is None)
        assert ours is None or not first_difference(ours, theirs), name


def short(tensor: Tensor) -> Tensor:
    """A copy whose memory ends one byte early."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(max(0, copy.untyped_storage().nbytes() - 1))
    return copy


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16]), max_size=5).map(tuple)
NUMBERS = st.one_of(st.floats(), st.integers(-3, 2**40), st.sampled_from([0.0, -1.0, 1e-50, 1e39, math.nan, math.inf]))
THINGS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), st.just([1.0]), st.just({}))
DTYPES = (*POOL_DTYPES, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool, torch.float8_e5m2fnuz)


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    """A tensor that has little to do with what is wanted: any shape and dtype, on no device, with too little memory."""
    tensor = torch.ones(draw(SHAPES)).to(draw(st.sampled_from(DTYPES)))
    return draw(
        st.sampled_from(
            [tensor, tensor, tensor, tensor.to("meta"), short(tensor), tensor[None].expand(2, *tensor.shape)]
        )
    )


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call of `gather` and of the plan it needs, with one to three arguments replaced by something else."""
    layout = draw(st.sampled_from(LAYOUTS))
    kinds = st.sampled_from(KINDS)
    built = build(
        Case(
            layout=layout,
            num_blocks=4,
            lengths=(5,),
            starts=(14,),
            num_heads=draw(st.integers(1, 2)),
            k_kind=draw(kinds),
            v_kind=draw(kinds),
        )
    )
    call: dict[str, Any] = {
        "block_table": built.block_table, "cu_seqlens_k": built.cu_seqlens_k, "page_size": 16, "num_blocks": 4,
        "total_tokens": 5, "seq_starts": built.seq_starts, "key_cache": built.cache.key_cache,
        "value_cache": built.cache.value_cache, "layout": layout, "k_scale": built.cache.k_scale,
        "v_scale": built.cache.v_scale, "out_dtype": torch.float32, "backend": draw(st.sampled_from(["torch", "auto"])),
    }  # fmt: skip
    heads = built.case.num_heads
    shapes = [(), (1,), (heads,), (4, heads), (4, heads, 16), (4, 16, heads), (heads, 4), (4,)]
    scales = st.one_of(st.sampled_from(shapes).map(lambda shape: torch.rand(shape) + 0.5), st.floats(0.1, 9), st.none())
    near: dict[str, st.SearchStrategy[Any]] = {
        "block_table": st.lists(st.integers(-2, 6), min_size=3, max_size=3).map(lambda ids: torch.tensor([ids])),
        "cu_seqlens_k": st.tuples(st.integers(-1, 3), st.integers(-5, 60)).map(torch.tensor),
        "page_size": st.sampled_from([16, 8, 32]),
        "num_blocks": st.integers(0, 6),
        "total_tokens": st.one_of(st.none(), st.integers(-1, 60)),
        "seq_starts": st.integers(-40, 90).map(lambda start: torch.tensor([start])),
        "layout": st.sampled_from(LAYOUTS),
        "k_scale": scales,
        "v_scale": scales,
        "out_dtype": st.sampled_from((*DTYPES, None, "bfloat16")),
        "backend": st.just("torch"),
    }
    names = [*near, *near, "cu_seqlens_k", "cu_seqlens_k", "key_cache", "value_cache"]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        far = st.one_of(THINGS, tensors())
        usable = name in near and draw(st.integers(0, 3)) > 0
        call[name] = draw(near[name] if usable else far)
    return call


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls())
def test_a_wrong_call_is_refused_by_name_or_right_after_all(call: dict[str, Any]) -> None:
    plan_arguments = ("block_table", "cu_seqlens_k", "page_size", "num_blocks", "total_tokens", "seq_starts")
    try:
        plan = kg.GatherPlan.build(**{name: call[name] for name in plan_arguments})
        rows = kg.gather(plan=plan, **{name: value for name, value in call.items() if name not in plan_arguments})
    except (TypeError, ValueError) as error:
        assert re.match(r"(cu_seqlens_k\[-1\]|plan|\w+) ", str(error)) and "accepted" in str(error), str(error)
        named = re.split(r"[\s\[]", str(error), maxsplit=1)[0]
        assert named in {*call, "head_dim", "plan"}, str(error)
        return
    geometry = Geometry.of(call["key_cache"], call["value_cache"], call["layout"])
    given_offsets = call["cu_seqlens_k"].long()
    offsets = given_offsets.cummax(0).values.clamp(0, plan.total_tokens)
    k_scale, v_scale = call["k_scale"], call["v_scale"]
    sides = (("key", call["key_cache"], k_scale), ("value", call["value_cache"], v_scale))
    first, last = int(offsets[0]), int(offsets[-1])
    for (which, pool, scale), got in zip(sides, rows, strict=True):
        wanted = torch.zeros_like(got)
        usable = Geometry(**{**geometry.__dict__, "num_blocks": min(geometry.num_blocks, plan.num_blocks)})
        gather_rows(pool, which, scale, usable, call["block_table"], offsets, call["seq_starts"], wanted)
        assert not first_difference(got[first:last], wanted[first:last]), which
    if not torch.equal(given_offsets, offsets) or first:
        with pytest.raises(kg.PlanError):
            plan.check()
