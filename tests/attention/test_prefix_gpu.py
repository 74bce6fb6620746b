"""The prefix path on a GPU: full sizes, nothing waits, graphs replay, and memory stays within what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import HEADS, MODELS, PAGES, SINKS, WINDOWS, Heads, sinks_of
from tests.attention.batches import Setup, assert_close, error, setup, ways_with
from tests.where import nothing_waits

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

NEW, CACHED = [1, 16, 512, 100, 0, 128], [8192, 4099, 0, 1500, 33, 1]
SHAPES = HEADS | {"8/2x64": Heads(8, 2, 64, 64)}
COMMON = ([16, 1, 200], [3000, 2048, 1025])  # at least 1,024 cached in each
WAYS = ways_with(workspace_tokens=1000)


def layout_for(page_size: int, dim: int, dtype: torch.dtype, turn: int) -> str:
    """SHUFFLE where its shapes allow, every third time; else the other two in turn."""
    x = 16 // dtype.itemsize
    shuffles = page_size % x == 0 and dim % x == 0
    return ("SHUFFLE" if shuffles else "HND", "NHD", "HND")[turn % 3]


def on_gpu(new: list[int], cached: list[int], heads: str = "64/8x64", **more: Any) -> Setup:
    shape = {"dtype": torch.float8_e4m3fn, "q_dtype": torch.bfloat16, "page_size": 16, **more}
    return setup(new, cached, heads=SHAPES[heads].counts, dims=SHAPES[heads].dims, device="cuda", **shape)


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("heads", MODELS)
def test_every_shape_on_every_path(heads: str, page_size: int) -> None:
    turn = MODELS.index(heads) + PAGES.index(page_size)
    dtype = (torch.float8_e4m3fn, torch.bfloat16)[turn % 2]
    layout = layout_for(page_size, HEADS[heads].head_dim, dtype, turn)
    for new, cached in ((NEW, CACHED), COMMON):
        made = on_gpu(new, cached, heads, page_size=page_size, dtype=dtype, layout=layout, spare=3)
        batches = {lengths: made.batch(lengths, max_q=max(new), max_k=max(made.total)) for lengths in (True, False)}
        for batch in batches.values():
            batch.check()
        made.attend(batches[True])
        for window in WINDOWS:
            for which in SINKS:
                sinks = sinks_of(which, HEADS[heads].q_heads, "cuda")
                wanted = made.wanted(window=window, sinks=sinks)
                for way, (lengths, call) in WAYS.items():
                    if way in ("hybrid", "direct", "direct, bounds") and (window == 1 or sinks is None):
                        continue  # each would compile a kernel more; tests/attention/test_direct.py has them
                    out, lse = made.attend(batches[lengths], window=window, sinks=sinks, **call)
                    try:
                        assert_close((out, lse), wanted, made.rows)
                    except AssertionError as wrong:
                        raise AssertionError(f"{way}, window {window}, sinks {which}, {layout}: {wrong}") from wrong
                    assert out[made.rows :].eq(0).all(), way
                    if which == "very large":
                        assert out.eq(0).all(), way


@pytest.mark.parametrize("kind", ["per-tensor", "per-head", "per-page-head", "per-token-head"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
def test_every_way_agrees_with_no_cache_at_all(layout: str, kind: str) -> None:
    new, cached = [64, 5, 1], [1024, 300, 2000]
    hit = on_gpu(new, cached, layout=layout, kind=kind)
    cold = on_gpu([n + c for n, c in zip(new, cached, strict=True)], [0, 0, 0], layout=layout, kind=kind)
    cold.q[hit.is_new] = hit.q
    for window in (None, 100):
        wanted, wanted_lse = cold.attend(cold.batch(), window=window, path="gather")
        for way, (lengths, call) in WAYS.items():
            out, lse = hit.attend(hit.batch(lengths), window=window, **call)
            assert error(out, wanted[hit.is_new].double()) <= 1e-2, way
            torch.testing.assert_close(lse, wanted_lse[hit.is_new], rtol=1e-2, atol=2e-2)
        for ours, theirs in zip(hit.held(), cold.held(), strict=True):
            assert torch.equal(ours, theirs), "the pools hold the same"


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_of_q(q_dtype: torch.dtype) -> None:
    made = on_gpu([3, 40, 1], [100, 0, 1030], q_dtype=q_dtype)
    for window in (None, 50):
        for way, (lengths, call) in WAYS.items():
            got = made.attend(made.batch(lengths), window=window, **call)
            out, lse = got
            wanted = made.wanted(window=window)
            assert out.dtype == q_dtype
            assert error(out, wanted[0]) <= (1e-4 if q_dtype == torch.float32 else 1e-2), way
            torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-2, atol=2e-2)


def test_a_bad_block_is_nan_on_every_path() -> None:
    made = on_gpu([2, 2, 3], [90, 50, 60])
    made.block_table[1, 0] = 10**6
    for way, (lengths, call) in WAYS.items():
        batch = made.batch(lengths)
        out, _ = made.attend(batch, **{**call, **({"workspace_tokens": 40} if "workspace" in way else {})})
        assert out[2:4].isnan().all(), way
        assert not out[:2].isnan().any() and not out[4:].isnan().any(), way
        with pytest.raises(kg.PlanError, match=r"block_table\[1, 0\] \(sequence 1, column 0\) is 1000000"):
            batch.check()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [None, 128])
def test_nothing_waits_for_the_gpu(window: int | None, way: str) -> None:
    made = on_gpu([16, 1, 200], [3000, 2048, 1025])
    lengths, call = WAYS[way]
    tokens, sinks = made.new_tokens(), sinks_of("on", 64, "cuda")
    table, (cu_q, cu_k) = made.block_table, made.offsets
    g = made.cache.geometry
    known: dict[str, Any] = {"seqlens_q": made.new, "seqlens_k": made.total} if lengths else {"max_q": 200}
    for _ in range(2):  # the first time compiles
        with nothing_waits():
            batch = kg.PrefixBatch.build(
                table, cu_q, cu_k, page_size=g.page_size, num_blocks=g.num_blocks, total_q=made.rows,
                total_k=sum(made.total), windows=(128,), **known,
            )  # fmt: skip
            out = kg.prefix_attention(made.q, *tokens, made.cache, batch, sinks=sinks, window=window, **call)
    assert isinstance(out, Tensor)
    assert error(out, made.wanted(sinks=sinks, window=window)[0]) <= 1e-2


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("way", [way for way in WAYS if "bounds" in way])
def test_a_graph_replays_with_other_lengths_and_tables(way: str, window: int | None) -> None:
    """The batch is built inside the graph, from buffers whose contents change; sizes are bounds."""
    mixes = [
        ([5, 30, 1], [300, 90, 700]), ([1, 1, 1], [900, 0, 16]), ([0, 36, 0], [5, 64, 0]), ([12] * 3, [100] * 3),
    ]  # fmt: skip
    steps = [on_gpu(new, cached, "8/2x64", seed=seed) for seed, (new, cached) in enumerate(mixes)]
    rows, tokens, columns, blocks = 36, 1500, 64, max(step.cache.geometry.num_blocks for step in steps)
    cache = kg.PagedKVCache(blocks, 16, 2, 64, dtype=torch.float8_e4m3fn, k_scale=0.03, v_scale=0.02, device="cuda")
    table = torch.zeros((3, columns), dtype=torch.int64, device="cuda")
    cu_q, cu_k = (torch.zeros(4, dtype=torch.int32, device="cuda") for _ in range(2))
    q, k, v = (torch.zeros(rows, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2))
    call = WAYS[way][1] | ({"workspace_tokens": 300} if "workspace" in way else {})

    def step() -> tuple[Tensor, Tensor]:
        batch = kg.PrefixBatch.build(
            table, cu_q, cu_k, page_size=16, num_blocks=blocks, total_q=rows, total_k=tokens, max_q=rows, max_k=1000
        )
        return kg.prefix_attention(q, k, v, cache, batch, window=window, return_lse=True, **call)

    def load(made: Setup) -> None:
        for pool, other in ((cache.key_cache, made.cache.key_cache), (cache.value_cache, made.cache.value_cache)):
            pool[: len(other)].view(torch.uint8).copy_(other.view(torch.uint8))
        table.fill_(10**7)
        table[:, : made.block_table.shape[1]] = made.block_table
        for offsets, given in zip((cu_q, cu_k), made.offsets, strict=True):
            offsets.copy_(given)
        for buffer, given in zip((q, k, v), (made.q, *made.new_tokens()), strict=True):
            buffer.fill_(torch.nan)
            buffer[: made.rows] = given

    load(steps[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for made in (*steps, steps[0]):
        load(made)
        graph.replay()
        made.cache.write(made.k[made.is_new], made.v[made.is_new], made.all_slots[made.is_new])
        assert_close((out, lse), _padded(made.wanted(window=window), rows), made.rows)
        assert out[made.rows :].eq(0).all()


def _padded(wanted: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    out, lse = wanted
    return (
        torch.cat((out, out.new_zeros(rows - len(out), *out.shape[1:]))),
        torch.cat((lse, lse.new_zeros(rows - len(lse), *lse.shape[1:]))),
    )


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("new", [16, 2048])
@pytest.mark.parametrize("window", [None, 128])
def test_memory_stays_within_the_workspace_and_two_outputs(window: int | None, new: int, lengths: bool) -> None:
    workspace = 8192
    made = on_gpu([new] * 4, [60000, 65536, 1000, 10])
    batch, tokens = made.batch(lengths, max_q=new), made.new_tokens()
    sinks = sinks_of("on", 64, "cuda")

    def attend() -> Tensor:
        return kg.prefix_attention(
            made.q, *tokens, made.cache, batch, sinks=sinks, window=window, path="gather", workspace_tokens=workspace
        )

    attend()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    allowed = workspace * 8 * (64 + 64) * 2 + 2 * out.numel() * 4
    assert extra <= 1.05 * allowed, f"{extra / allowed:.2f} of what is allowed"
    whole = kg.prefix_attention(made.q, None, None, made.cache, batch, sinks=sinks, window=window, path="gather")
    assert isinstance(whole, Tensor) and error(out, whole.double()) <= 1e-2
