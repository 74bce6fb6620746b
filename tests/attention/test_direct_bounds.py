"""No address of the direct kernel is outside its tensor: all accesses written down, and memory that faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention.batch import PrefixBatch
from kvgather.device import has_gpu, interpreting
from kvgather.lab.fence import SIDES, fenced
from kvgather.lab.trace import trace
from tests.attention.batches import Setup
from tests.attention.direct_cases import filled
from tests.attention.test_direct import attend
from tests.where import on_each_device

TRACED_ON = "cuda" if has_gpu() and not interpreting() else "cpu"  # the trace interprets kernels on either
NEW, CACHED = [3, 0, 2], [17, 4, 0]
VARIANTS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (  # the cache, the call
    ({"layout": "NHD", "kinds": ("per-tensor", "per-token-head"), "page_size": 10}, {}),
    ({"layout": "NHD", "kinds": ("none", "per-head"), "page_size": 1, "dims": (24, 40)}, {"window": 5}),
    ({"layout": "HND", "kinds": ("per-page-head", "none"), "page_size": 3, "dims": (40, 24)}, {"tile": (16, 3)}),
    ({"layout": "SHUFFLE", "kinds": ("per-token-head", "per-page-head"), "page_size": 16, "dims": (48, 16)}, {}),
    (
        {"layout": "SHUFFLE", "kinds": ("per-head", "per-token-head"), "page_size": 16, "dims": (16, 48)},
        {"window": 4, "tile": (32, 2)},
    ),
)


def setup_for(shape: dict[str, Any], where: str) -> Setup:
    shape = {"dims": (16, 16), "dtype": torch.float8_e4m3fn, "heads": (6, 2), "spare": 2, **shape}
    return filled(NEW, CACHED, device=where, **shape)


def spoil(made: Setup) -> None:
    """Ids of both ends of the pool, and some that are not in it."""
    last = made.cache.geometry.num_blocks - 1
    row = torch.tensor([0, last, -1, last + 1, 2**31 - 1], device=made.block_table.device)
    made.block_table[:] = row.repeat(5)[: made.block_table.shape[1]]


def extras(made: Setup, where: str) -> dict[str, Any]:
    heads, dim, rows = 6, made.cache.geometry.v_head_dim, len(made.q)
    return {
        "sinks": torch.zeros(heads, device=where),
        "begin": torch.tensor([5, 0, 0], dtype=torch.int32, device=where),
        "state": (torch.zeros(rows, heads, dim, device=where), torch.zeros(rows, heads, device=where)),
    }


@pytest.mark.triton
@pytest.mark.parametrize("bad", [False, True], ids=["good table", "bad table"])
@pytest.mark.parametrize(("shape", "call"), VARIANTS, ids=str)
def test_no_access_is_outside_its_tensor(shape: dict[str, Any], call: dict[str, Any], bad: bool) -> None:
    made = setup_for(shape, TRACED_ON)
    if bad:
        spoil(made)
    more = extras(made, TRACED_ON) if "window" not in call else {"sinks": torch.zeros(6, device=TRACED_ON)}
    with trace(strict=True) as t:
        attend(made, **call, **more)
    assert not t.violations, t.report()
    read = {"q_ptr", "k_ptr", "v_ptr", "table_ptr", "cu_q_ptr", "cu_k_ptr", "sink_ptr"}
    assert {access.argument for access in t.accesses} >= read
    for argument in ("k_ptr", "v_ptr", "q_ptr", "k_scale_ptr", "v_scale_ptr", "table_ptr"):
        assert not list(t.select(argument, kind="store"))
    split = t.launches[0].arguments["out_ptr"].dim() == 4
    assert len(t.launches) == 1 + split
    out = t.launches[-1].arguments["out_ptr"]
    stored = [access for access in t.select("out_ptr", kind="store") if access.launch == len(t.launches) - 1]
    assert sum(int(access.mask.sum()) for access in stored) == out.numel()  # every element, and once


@pytest.mark.triton
def test_only_blocks_that_a_window_reaches_are_read() -> None:
    made = filled([1], [40], page_size=4, heads=(2, 1), device=TRACED_ON)
    with trace() as t:
        attend(made, (16, 1), window=6)  # positions 35 to 40
    wanted = {int(block) for block in made.block_table[0, 8:11]}
    g = made.cache.geometry
    for which in ("k_ptr", "v_ptr"):
        assert set(t.bytes_touched(which) // (4 * g.page_size * g.num_kv_heads * g.head_dim)) == wanted


def at_the_edge(made: Setup, where: str, side: str) -> tuple[Setup, PrefixBatch]:
    """The same cache, batch and rows, each tensor in memory of its own that ends (or begins) where the tensor does."""
    if where == "cuda" and torch.version.hip is None:
        pytest.importorskip("cuda.bindings.driver", reason="a fence on an NVIDIA GPU needs cuda-bindings")

    def move(tensor: Tensor | None) -> Any:
        return None if tensor is None else fenced(tensor, where, side)

    cache = made.cache
    edge = kg.PagedKVCache.from_tensors(
        move(cache.key_cache), move(cache.value_cache), layout=cache.layout, k_kind=cache.scales[0].kind,
        v_kind=cache.scales[1].kind, k_scale=move(cache.k_scale), v_scale=move(cache.v_scale),
    )  # fmt: skip
    batch = made.batch()
    batch = replace(
        batch, block_table=move(batch.block_table), cu_seqlens_q=move(batch.cu_seqlens_q),
        cu_seqlens_k=move(batch.cu_seqlens_k),
    )  # fmt: skip
    return replace(made, cache=edge, q=move(made.q)), batch


@on_each_device
@pytest.mark.triton
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "call"), VARIANTS, ids=str)
def test_attention_at_the_edge_of_memory(shape: dict[str, Any], call: dict[str, Any], side: str, where: str) -> None:
    made = setup_for(shape, where)
    spoil(made)
    made.block_table[2, 0] = 0
    wanted = attend(made, **call)
    edge, batch = at_the_edge(made, where, side)
    got = attend(edge, batch=batch, **call)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
