"""No address outside any tensor: every argument at the edge of memory that faults, and every access written down.

A gather that leaves its tensors ends this process, which pytest reports as a crashed worker.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import Built, Case, build
from kvgather.device import has_gpu, interpreting
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from kvgather.lab.fence import SIDES, fenced
from kvgather.lab.trace import trace
from tests.gather.oracle import assert_same, untouched
from tests.where import on_each_device

TRACED_ON = "cuda" if has_gpu() and not interpreting() else "cpu"  # the trace interprets kernels on either
SMALLEST_AND_LARGEST = [[4, 0, 4], [0, -1, 5]]  # ids at both ends of a pool of 5, and two that are not in it


def edge_case(layout: str, k_kind: str, v_kind: str) -> Case:
    return Case(
        layout=layout, k_kind=k_kind, v_kind=v_kind, page_size=16 if layout == "SHUFFLE" else 10, num_heads=3,
        k_dim=48, v_dim=80, lengths=(35, 12), starts=(10, 9), num_blocks=5, dtype=torch.float8_e4m3fn,
    )  # fmt: skip


def at_the_edge(built: Built, where: str, side: str) -> tuple[Built, tuple[Tensor, Tensor]]:
    """The same cache and plan, each tensor in memory of its own that ends (or begins) where the tensor does; and a
    place for the rows of the same kind."""
    cache, case = built.cache, built.case
    if where == "cuda" and torch.version.hip is None:
        pytest.importorskip("cuda.bindings.driver", reason="a fence on an NVIDIA GPU needs cuda-bindings")

    def move(tensor: Tensor) -> Tensor:
        return fenced(tensor, where, side)

    edge = kg.PagedKVCache.from_tensors(
        move(cache.key_cache), move(cache.value_cache), layout=case.layout, k_kind=case.k_kind, v_kind=case.v_kind,
        k_scale=None if cache.k_scale is None else move(cache.k_scale),
        v_scale=None if cache.v_scale is None else move(cache.v_scale),
    )  # fmt: skip
    table, offsets = move(built.block_table), move(built.cu_seqlens_k)
    starts = None if built.seq_starts is None else move(built.seq_starts)
    plan = kg.GatherPlan.build(
        table, offsets, page_size=case.page_size, num_blocks=cache.geometry.num_blocks,
        total_tokens=case.total_tokens, seq_starts=starts,
    )  # fmt: skip
    plan = replace(plan, records=move(plan.records))
    out = [
        move(untouched((case.total_tokens, case.num_heads, dim), case.out_dtype)) for dim in (case.k_dim, case.v_dim)
    ]
    return replace(built, cache=edge, plan=plan), (out[0], out[1])


def with_table(built: Built, table: list[list[int]]) -> Built:
    tensor = torch.tensor(table, dtype=torch.int32, device=built.block_table.device)
    plan = kg.GatherPlan.build(
        tensor, built.cu_seqlens_k, page_size=built.case.page_size, num_blocks=5,
        total_tokens=built.case.total_tokens, seq_starts=built.seq_starts,
    )  # fmt: skip
    return replace(built, block_table=tensor, plan=plan)


@on_each_device
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("layout", "k_kind", "v_kind"),
    [
        ("NHD", "per-tensor", "per-head"),
        ("HND", "per-page-head", "per-token-head"),
        ("SHUFFLE", "per-tensor", "per-token-head"),
        ("SHUFFLE", "per-head", "none"),
    ],
)
def test_every_argument_at_the_edge_of_memory(layout: str, k_kind: str, v_kind: str, side: str, where: str) -> None:
    built = with_table(build(edge_case(layout, k_kind, v_kind), where), SMALLEST_AND_LARGEST)
    wanted = built.cache.gather(built.plan, backend="torch")
    for backend in ("triton", "torch"):
        edge, out = at_the_edge(built, where, side)
        edge.cache.gather(edge.plan, out=out, backend=backend)
        assert_same(out, wanted)


@on_each_device
@pytest.mark.parametrize("side", SIDES)
def test_bare_bits_and_one_element_at_the_edge_of_memory(side: str, where: str) -> None:
    one = Case(page_size=1, num_heads=1, k_dim=1, v_dim=1, lengths=(1,), starts=(), num_blocks=1, dtype=torch.float16)
    raw = replace(edge_case("HND", "none", "none"), out_dtype=torch.float8_e4m3fn, lengths=(3, 12))
    for case in (one, raw):
        built = build(case, where)
        wanted = built.cache.gather(built.plan, out_dtype=case.out_dtype, backend="torch")
        for backend in ("triton", "torch"):
            edge, out = at_the_edge(built, where, side)
            edge.cache.gather(edge.plan, out_dtype=case.out_dtype, out=out, backend=backend)
            assert_same(out, wanted)


@on_each_device
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_at_the_edge_of_memory(layout: str, side: str, where: str) -> None:
    for backend in ("triton", "torch"):
        built = build(edge_case(layout, "per-token-head", "per-head"), where)
        edge, _ = at_the_edge(built, where, side)
        last = edge.cache.num_slots - 1
        k, v = torch.randn(3, 3, 48), torch.randn(3, 3, 80)
        slots = torch.tensor([last, -1, 0])
        for cache in (built.cache, edge.cache):
            rows = [fenced(tensor, where, side) for tensor in (k, v, slots)]
            cache.write(rows[0], rows[1], rows[2], backend=backend)
        for ours, theirs in zip(
            (edge.cache.key_cache, edge.cache.value_cache),
            (built.cache.key_cache, built.cache.value_cache),
            strict=True,
        ):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


TRACED = [edge_case(layout, KINDS[i], KINDS[(i + 2) % 5]) for i, layout in ((0, "NHD"), (3, "HND"), (4, "SHUFFLE"))]
TRACED += [
    Case(layout=layout, pool_style=style, k_kind="per-token-head", lengths=(5,), starts=(14,), num_blocks=5)
    for layout, style in (("NHD", "sliced"), ("HND", "stepped"), ("SHUFFLE", "packed"))
]


@pytest.mark.triton
@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
def test_no_access_is_outside_its_tensor(case: Case) -> None:
    built = build(case, TRACED_ON)
    if len(case.lengths) == 2:
        built = with_table(built, SMALLEST_AND_LARGEST)
    out = (
        untouched((case.total_tokens + 1, case.num_heads, case.k_dim), case.out_dtype, TRACED_ON),
        untouched((case.total_tokens + 1, case.num_heads, case.v_dim), case.out_dtype, TRACED_ON),
    )
    with trace(strict=True) as t:
        built.cache.gather(built.plan, out=out, backend="triton")
    assert not t.violations, t.report()
    arguments = {access.argument for access in t.accesses}
    read = {"k_ptr", "v_ptr", "page_ptr"}
    read |= {f"{which}_scale_ptr" for which in "kv" if getattr(case, f"{which}_kind") != "none"}
    assert arguments == read | {"k_out_ptr", "v_out_ptr"}
    for which, rows in zip("kv", out, strict=True):
        stored = t.bytes_touched(f"{which}_out_ptr", kind="store")
        row = rows.shape[1] * rows.shape[2] * rows.element_size()
        assert np.array_equal(stored, np.arange(case.total_tokens * row))  # every byte of every row, and no other
        assert not list(t.select(f"{which}_out_ptr", kind="load"))
        assert not list(t.select(f"{which}_ptr", kind="store"))


@pytest.mark.triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_write_is_outside_its_tensor(layout: str) -> None:
    built = build(edge_case(layout, "per-token-head", "per-page-head"), TRACED_ON)
    cache, page = built.cache, built.case.page_size
    slots = torch.tensor([5 * page - 1, -1, 0], device=TRACED_ON)
    k, v = torch.randn(3, 3, 48, device=TRACED_ON), torch.randn(3, 3, 80, device=TRACED_ON)
    with trace(strict=True) as t:
        cache.write(k, v, slots, backend="triton")
    assert not t.violations, t.report()
    assert len(t.bytes_touched("k_ptr", kind="store")) == 2 * 3 * 48
    assert len(t.bytes_touched("v_ptr", kind="store")) == 2 * 3 * 80
    assert len(t.bytes_touched("k_scale_ptr", kind="store")) == 2 * 3 * 4
    assert not list(t.select("v_scale_ptr", kind="store"))


@pytest.mark.triton
def test_nothing_is_launched_for_nothing() -> None:
    for case in (Case(lengths=(), starts=()), Case(lengths=(0, 0), starts=())):
        built = build(case, TRACED_ON)
        with trace() as t:
            k, v = built.cache.gather(built.plan, backend="triton")
        assert (len(t.launches), k.shape, v.shape) == (0, (0, 2, 16), (0, 2, 16))


@pytest.mark.triton
def test_a_page_is_read_by_its_own_programs_alone() -> None:
    """Two tokens of one page: no byte of another block is read, whatever the table holds beyond."""
    built = build(Case(lengths=(2,), starts=(3,), num_blocks=4), TRACED_ON)
    block = int(built.block_table[0, 0])
    with trace() as t:
        built.cache.gather(built.plan, backend="triton")
    for which in ("k_ptr", "v_ptr"):
        assert set(t.bytes_touched(which) // (16 * 2 * 16)) == {block}
