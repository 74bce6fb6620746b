"""prefix_attention against the reference, against itself without a cache, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import kvgather as kg
from kvgather.blocks import cu_seqlens
from kvgather.cases import HEADS, MODELS, PAGES, SINKS, WINDOWS, sinks_of
from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from tests.attention.batches import Setup, assert_close, error, gather_first, hybrid, setup
from tests.where import on_each_device

MIXES: dict[str, tuple[list[int], list[int]]] = {  # new tokens, cached tokens
    "nothing cached": ([5, 3], [0, 0]),
    "all but one cached": ([1, 1], [15, 16]),
    "decode, ragged": ([1, 1, 1, 1], [0, 1, 16, 37]),
    "an empty sequence": ([3, 0, 2], [4, 0, 9]),
    "cached, and nothing new": ([0, 2, 0], [9, 5, 1]),
    "ragged": ([9, 1, 4, 2], [0, 33, 3, 16]),
    "no sequences": ([], []),
    "no tokens": ([0, 0], [0, 0]),
    "nothing new at all": ([0, 0], [7, 3]),
}


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_batches(mix: str, lengths: bool) -> None:
    new, cached = MIXES[mix]
    for window in (None, 1, 3, 20):
        for spare in (0, 3):
            made = setup(new, cached, spare=spare)
            sinks = sinks_of("on", 4)
            got = made.attend(made.batch(lengths), window=window, sinks=sinks, softmax_scale=0.4)
            wanted = made.wanted(raw=True, window=window, sinks=sinks, softmax_scale=0.4)
            assert_close(got, wanted, made.rows)
            assert got[0][made.rows :].eq(0).all(), "rows that belong to no sequence"
            assert got[0].shape == (made.rows + spare, 4, 8)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("heads", MODELS)
def test_every_shape(heads: str, page_size: int, window: int | None, sinks: str) -> None:
    made = setup([3, 1, 2], [128, 0, 17], heads=HEADS[heads].counts, dims=HEADS[heads].dims, page_size=page_size)
    logits = sinks_of(sinks, HEADS[heads].q_heads)
    out, lse = made.attend(made.batch(), window=window, sinks=logits)
    assert_close((out, lse), made.wanted(raw=True, window=window, sinks=logits))
    if sinks == "very large":
        assert out.eq(0).all()


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
def test_every_pool(dtype: torch.dtype, layout: str, q_dtype: torch.dtype) -> None:
    kinds = KINDS if dtype.itemsize == 1 else ("none",)
    for kind in kinds:
        made = setup(
            [5, 1, 2], [14, 33, 0], page_size=16, dims=(32, 16), layout=layout, dtype=dtype, kind=kind, q_dtype=q_dtype
        )
        sinks = sinks_of("on", 4)
        out, lse = made.attend(made.batch(), sinks=sinks)
        assert out.dtype == q_dtype
        assert_close((out, lse), made.wanted(sinks=sinks))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_prefix_gives_what_no_cache_gives(kind: str, layout: str) -> None:
    shape: dict[str, Any] = {
        "dims": (16, 16), "page_size": 16, "layout": layout, "dtype": torch.float8_e4m3fn, "kind": kind,
    }  # fmt: skip
    new, cached = [5, 1, 7], [16, 40, 3]
    hit = setup(new, cached, **shape)
    cold = setup([n + c for n, c in zip(new, cached, strict=True)], [0, 0, 0], **shape)
    queries = torch.randn_like(cold.q)
    queries[cold.is_new & hit.is_new] = hit.q
    cold.q = queries
    for window in (None, 4):
        from_hit, lse_hit = hit.attend(hit.batch(), window=window)
        from_cold, lse_cold = cold.attend(cold.batch(), window=window)
        for ours, theirs in zip(hit.held(), cold.held(), strict=True):
            assert torch.equal(ours, theirs), "the pools hold the same"
        assert error(from_hit, from_cold[hit.is_new].double()) <= 1e-5
        torch.testing.assert_close(lse_hit, lse_cold[hit.is_new])


def test_two_prompts_with_one_prefix_share_blocks_and_agree_with_no_cache() -> None:
    """A pool's hit, from its block ids to the output."""
    page, prefix = 4, list(range(100, 110))
    pool = kg.BlockPool(num_blocks=12, page_size=page)
    cache = kg.PagedKVCache(12, page, 2, 8, dtype=torch.float32, scale="none", device="cpu")
    k, v, q = (torch.randn(200, heads, 8) for heads in (2, 2, 4))  # by token id, as a model with no positions has them

    def forward(*prompts: list[int]) -> list[Tensor]:
        seqs = [pool.allocate(prompt) for prompt in prompts]
        new = [seq.num_tokens - seq.num_computed_tokens for seq in seqs]
        total = [seq.num_tokens for seq in seqs]
        batch = kg.PrefixBatch.build(
            pool.block_table(seqs), cu_seqlens(new), cu_seqlens(total), page_size=page, num_blocks=12,
            seqlens_q=new, seqlens_k=total,
        )  # fmt: skip
        batch.check()
        assert batch.slots.tolist() == torch.cat([pool.slots(s, s.num_computed_tokens) for s in seqs]).tolist()
        rows = torch.tensor([token for seq in seqs for token in seq.token_ids[seq.num_computed_tokens :]])
        out = kg.prefix_attention(q[rows], k[rows], v[rows], cache, batch)
        for seq in seqs:
            pool.commit(seq)
        assert isinstance(out, Tensor)
        return list(out.split(new))

    def from_scratch(prompt: list[int]) -> Tensor:
        scores = torch.einsum("qgd,kgd->gqk", q[prompt], k[prompt].repeat_interleave(2, 1)) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
        return torch.einsum("gqk,kgd->qgd", scores.softmax(-1), v[prompt].repeat_interleave(2, 1))

    first, second, third = [*prefix, 1, 2, 3], [*prefix, 7], [*prefix[:5], 9, 9]
    (whole,) = forward(first)
    torch.testing.assert_close(whole, from_scratch(first))
    suffixes = forward(second, third)
    assert [len(suffix) for suffix in suffixes] == [len(second) - 8, len(third) - 4]  # hits of two blocks, and of one
    assert pool.stats.hit_tokens == 12
    for suffix, prompt in zip(suffixes, (second, third), strict=True):
        torch.testing.assert_close(suffix, from_scratch(prompt)[-len(suffix) :])


def test_tokens_that_are_in_the_cache_already() -> None:
    made = setup([5, 1, 2], [4, 9, 0])
    batch = made.batch()
    wanted = made.attend(batch)
    before = made.cache.key_cache.clone()
    got = kg.prefix_attention(made.q, None, None, made.cache, batch, return_lse=True)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert torch.equal(made.cache.key_cache, before)
    alone = kg.prefix_attention(made.q, None, None, made.cache, batch)
    assert isinstance(alone, Tensor) and torch.equal(alone, wanted[0])


def test_one_batch_serves_layers_with_other_heads_windows_and_scales() -> None:
    made = setup([5, 1], [4, 19])
    batch = made.batch()
    for heads, window, seed in ((2, None, 1), (6, 3, 2), (4, None, 3)):
        layer = setup([5, 1], [4, 19], heads=(heads, 2), seed=seed)
        layer.block_table, layer.all_slots = made.block_table, made.all_slots
        layer.cache.write(layer.k[~layer.is_new], layer.v[~layer.is_new], made.all_slots[~layer.is_new])
        assert_close(layer.attend(batch, window=window), layer.wanted(raw=True, window=window))


def test_rows_of_q_that_are_views_and_want_gradients() -> None:
    made = setup([5, 1], [4, 19])
    wanted = made.attend(made.batch())
    made.q = torch.stack((made.q, made.q), -1)[..., 0].requires_grad_()
    out, lse = made.attend(made.batch())
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    assert not out.requires_grad


@pytest.mark.parametrize("window", [None, 2])
def test_a_bad_block_gives_rows_of_nan_and_check_says_where(window: int | None) -> None:
    made = setup([2, 2, 3], [9, 5, 6])
    made.block_table[1, 0] = 10**6  # positions 0 to 3 of the second sequence
    batch = made.batch()
    out, lse = made.attend(batch, window=window)
    assert out[2:4].isnan().all() == (window is None), "a window of 2 ends before the bad block"
    assert not out[:2].isnan().any() and not out[4:].isnan().any() and not lse[4:].isnan().any()
    with pytest.raises(kg.PlanError, match=r"block_table\[1, 0\] \(sequence 1, column 0\) is 1000000"):
        batch.check()
    for got in (made.attend(made.batch(lengths=False), window=window), made.attend(batch, window=window)):
        torch.testing.assert_close(got[0], out, equal_nan=True)


def test_a_sequence_longer_than_its_table_is_nan_and_alone() -> None:
    made = setup([2, 2], [9, 5])
    made.block_table = made.block_table[:, :2].contiguous()
    batch = made.batch(lengths=False)
    out, _ = made.attend(batch)
    assert out[:2].isnan().all() and not out[2:].isnan().any()
    with pytest.raises(kg.PlanError, match=r"sequence 0, column 2"):
        batch.check()


def contents(cache: kg.PagedKVCache) -> list[Tensor]:
    return [tensor.clone() for tensor in (cache.key_cache, cache.value_cache, cache.k_scale) if tensor is not None]


def refused(made: Setup, error: type[Exception], message: str, **arguments: Any) -> None:
    """The call raises, and the cache is as it was."""
    before = contents(made.cache)
    k_new, v_new = made.new_tokens()
    call = {"q": made.q, "k_new": k_new, "v_new": v_new, "cache": made.cache, "batch": made.batch(), **arguments}
    with pytest.raises(error, match=message):
        kg.prefix_attention(**call)
    assert all(torch.equal(now, then) for now, then in zip(contents(made.cache), before, strict=True))


ROWS = 6  # new tokens of the batch below


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, r"q is list \[1.0\]; accepted: a torch.Tensor"),
        ({"q": torch.zeros(ROWS, 32)}, ValueError, r"q has shape \[6, 32\]; accepted: 3 dimensions"),
        ({"q": torch.zeros(ROWS, 4, 8).double()}, TypeError, r"q has dtype float64; accepted: bfloat16, float16"),
        ({"q": torch.zeros(ROWS, 4, 8, device="meta")}, ValueError, r"q is on meta; accepted: cpu"),
        ({"q": torch.zeros(7, 4, 8)}, ValueError, r"q has shape \[7, 4, 8\]; accepted for total_q 6: \[6, a multiple"),
        ({"q": torch.zeros(ROWS, 3, 8)}, ValueError, r"q has shape \[6, 3, 8\]; accepted .*a multiple of 2 heads, 8\]"),
        ({"q": torch.zeros(ROWS, 0, 8)}, ValueError, r"q has shape \[6, 0, 8\]; accepted"),
        ({"q": torch.zeros(ROWS, 4, 9)}, ValueError, r"q has shape \[6, 4, 9\]; accepted"),
        ({"k_new": None}, TypeError, r"k_new is None and v_new is not; accepted: both, or neither"),
        ({"v_new": None}, TypeError, r"v_new is None and k_new is not; accepted"),
        ({"k_new": torch.zeros(7, 2, 8)}, ValueError, r"k_new has shape \[7, 2, 8\]; accepted for total_q 6: \[6, 2"),
        ({"v_new": torch.zeros(ROWS, 2, 7)}, ValueError, r"v_new has shape \[6, 2, 7\]; accepted"),
        ({"v_new": torch.zeros(ROWS, 2, 8).int()}, TypeError, r"v_new has dtype int32; accepted"),
        ({"k_new": "k"}, TypeError, r"k_new is str 'k'; accepted: a torch.Tensor"),
        ({"cache": None}, TypeError, r"cache is NoneType None; accepted: a PagedKVCache"),
        ({"batch": None}, TypeError, r"batch is NoneType None; accepted: a PrefixBatch"),
        ({"softmax_scale": math.nan}, ValueError, r"softmax_scale is nan; accepted: finite values above 0"),
        ({"softmax_scale": 0.0}, ValueError, r"softmax_scale is 0.0; accepted: finite values above 0"),
        ({"softmax_scale": -0.5}, ValueError, r"softmax_scale is -0.5; accepted: finite values above 0"),
        ({"softmax_scale": "1"}, TypeError, r"softmax_scale is str '1'; accepted: None, or a number"),
        ({"softmax_scale": torch.tensor(1.0)}, TypeError, r"softmax_scale is Tensor of shape \[\]; accepted"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \[2\]; accepted for 4 query heads: one each"),
        ({"sinks": torch.zeros(4, 1)}, ValueError, r"sinks has shape \[4, 1\]; accepted: 1 dimensions"),
        ({"sinks": torch.zeros(4).int()}, TypeError, r"sinks has dtype int32; accepted"),
        ({"sinks": 0.5}, TypeError, r"sinks is float 0.5; accepted: a torch.Tensor"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, r"sinks is on meta; accepted: cpu"),
        ({"window": 0}, ValueError, r"window is 0; accepted: 1 to"),
        ({"window": 1.5}, TypeError, r"window is float 1.5; accepted: an int"),
        ({"workspace_tokens": 0}, ValueError, r"workspace_tokens is 0; accepted: 1 to"),
        ({"workspace_tokens": True}, TypeError, r"workspace_tokens is bool True; accepted: an int"),
        ({"workspace_tokens": 4, "window": 5}, ValueError, r"workspace_tokens is 4; accepted for a window of 5"),
        ({"path": "fast"}, ValueError, r"path is 'fast'; accepted: auto, direct, gather, hybrid"),
        ({"path": None}, TypeError, r"path is NoneType None; accepted: auto, direct, gather, hybrid"),
    ],
)  # fmt: skip
def test_wrong_arguments_write_nothing(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    refused(setup([5, 1], [4, 19], dtype=torch.float8_e4m3fn, kind="per-token-head"), error, message, **wrong)


def test_a_batch_for_another_cache_is_refused() -> None:
    made = setup([5, 1], [4, 19])
    for other, message in (
        (setup([5, 1], [4, 19], page_size=8), r"batch was made for page_size 8; accepted: the cache's, 4"),
        (setup([5, 1], [4, 60]), r"batch was made for a pool of \d+ blocks; accepted: at most the cache's 10"),
    ):
        refused(made, ValueError, message, batch=other.batch())
    refused(made, ValueError, r"batch is on cpu; accepted: the cache's device, meta", cache=_on_meta(made.cache))
    larger = kg.PagedKVCache(99, 4, 2, 8, dtype=torch.float32, scale="none", device="cpu")
    assert isinstance(kg.prefix_attention(made.q, *made.new_tokens(), larger, made.batch()), Tensor)


def _on_meta(cache: kg.PagedKVCache) -> kg.PagedKVCache:
    """A cache that says that it is on another device; this machine may have no second one."""
    moved = kg.PagedKVCache.from_tensors(cache.key_cache, cache.value_cache, layout=cache.layout)
    assert moved.likeness >= 0  # compared with its geometry here, and not again
    moved.geometry = replace(cache.geometry, device=torch.device("meta"))
    return moved


def test_new_tokens_in_one_slot_write_nothing() -> None:
    made = setup([5, 1], [4, 19])
    made.block_table[1] = made.block_table[0, 2]  # both sequences' last block
    made.block_table[0, 2] = made.block_table[0, 1]
    message = r"^batch puts new tokens where they cannot go: slots\[\d\] and slots\[\d\] are both"
    refused(made, kg.SlotError, message)


def test_errors_about_the_caches_memory_name_the_cache() -> None:
    for writes in (True, False):
        made = setup([2, 1], [4, 3])
        made.cache.key_cache.untyped_storage().resize_(8)
        new = (made.k[made.is_new], made.v[made.is_new]) if writes else (None, None)
        with pytest.raises(ValueError, match=r"^cache cannot be read: key_cache with shape .* of its memory, which"):
            kg.prefix_attention(made.q, *new, made.cache, made.batch())
    made = setup([2, 1], [4, 3])
    pool = made.cache.key_cache[:1].expand(made.cache.key_cache.shape)
    cache = kg.PagedKVCache.from_tensors(pool, made.cache.value_cache, layout=made.cache.layout)
    with pytest.raises(ValueError, match=r"^cache cannot be written: key_cache has strides .* do not overlap"):
        kg.prefix_attention(made.q, made.k[made.is_new], made.v[made.is_new], cache, made.batch())


@st.composite
def batches(draw: st.DrawFn) -> tuple[Setup, dict[str, Any], bool]:
    sequences = draw(st.integers(0, 4))
    new = draw(st.lists(st.sampled_from([0, 1, 1, 2, 5, 9]), min_size=sequences, max_size=sequences))
    cached = draw(st.lists(st.sampled_from([0, 1, 3, 7, 16, 31, 40]), min_size=sequences, max_size=sequences))
    kv_heads = draw(st.integers(1, 2))
    heads = (kv_heads * draw(st.sampled_from([1, 3])), kv_heads)
    made = setup(
        new, cached, heads=heads, dims=draw(st.sampled_from([(4, 4), (6, 3)])),
        page_size=draw(st.sampled_from([1, 3, 4, 16])), spare=draw(st.sampled_from([0, 2])),
        seed=draw(st.integers(0, 9)),
    )  # fmt: skip
    arguments = {
        "window": draw(st.sampled_from([None, None, 1, 3, 20])),
        "workspace_tokens": draw(st.sampled_from([None, 1, 2, 3, 5, 8, 16, 17, 30, 64])),
        "sinks": draw(st.sampled_from([None, torch.linspace(-2, 2, heads[0])])),
        "softmax_scale": draw(st.sampled_from([None, 0.3])),
    }
    return made, arguments, draw(st.booleans())


def too_small(batch: kg.PrefixBatch, window: int | None, workspace_tokens: int | None, **_: Any) -> bool:
    """Whether a workspace cannot hold the keys of one new token at a time, and would have to."""
    if workspace_tokens is None or batch.for_window(window).plan.total_tokens <= workspace_tokens:
        return False
    if batch.seqlens_q is None:
        return workspace_tokens // max(batch.num_sequences, 1) < (window or 1) and batch.num_sequences > 0
    pairs = zip(batch.seqlens_q, batch.seqlens_k or (), strict=True)
    longest = max((min(k, q + (window or k) - 1) for q, k in pairs if q), default=0)
    return window is not None and workspace_tokens < window and workspace_tokens < longest


@settings(max_examples=300)
@given(batches())
def test_random_batches(drawn: tuple[Setup, dict[str, Any], bool]) -> None:
    made, arguments, lengths = drawn
    bounds = {} if lengths else {"max_q": max(made.new, default=0), "total_k": sum(made.total) + 3}
    batch = made.batch(lengths, **bounds)
    batch.check()
    if too_small(batch, **arguments):
        refused(made, ValueError, f"workspace_tokens is {arguments['workspace_tokens']}", batch=batch, **arguments)
        return
    got = made.attend(batch, path="gather", **arguments)
    del arguments["workspace_tokens"]
    assert_close(got, made.wanted(raw=True, **arguments), made.rows)


def test_explain_says_the_choice_its_numbers_and_where_they_come_from() -> None:
    made = setup([5, 1], [4, 19])
    told = made.batch().explain(made.cache, num_q_heads=4)
    assert "auto takes the gather path: on a cpu" in told
    assert "at most 5 new tokens and 20 tokens" in told and "2 query heads to each of 2 KV heads" in told
    for wrong, refusal, message in (
        ({"num_q_heads": 3}, ValueError, r"num_q_heads is 3; accepted: a multiple of the cache's 2 KV heads"),
        ({"num_q_heads": 4, "window": 0}, ValueError, r"window is 0"),
        ({"num_q_heads": 4, "dtype": torch.int8}, TypeError, r"dtype is int8; accepted"),
        ({"num_q_heads": 4, "cache": 3}, TypeError, r"cache is int 3; accepted"),
    ):
        with pytest.raises(refusal, match=message):
            made.batch().explain(**{"cache": made.cache, **wrong})


@on_each_device
@pytest.mark.parametrize("mix", ["ragged", "no sequences", "no tokens", "nothing new at all"])
def test_mixed_batches_straight_from_the_pages(mix: str, where: str) -> None:
    made = setup(*MIXES[mix], heads=(2, 1), dims=(16, 16), spare=3, device=where)
    for lengths in (True, False):
        got = made.attend(made.batch(lengths), path="direct", sinks=sinks_of("on", 2, where))
        assert error(got[0], made.wanted(sinks=sinks_of("on", 2, where))[0]) <= (1e-5 if where == "cpu" else 1e-2)
        assert got[0][made.rows :].eq(0).all()


@on_each_device
@pytest.mark.parametrize("which", ["off", "on"])
def test_the_hybrid_path(which: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a short common part; and with none, where it is the direct path."""
    made = setup([3, 0, 2], [20, 3, 9], heads=(2, 1), dims=(16, 16), spare=2, device=where, q_dtype=torch.bfloat16)
    sinks = sinks_of(which, 2, where)
    made.attend(made.batch())
    for length in (0, 4, 9):
        gather_first(monkeypatch, length)
        got = hybrid(made, made.batch(), 0.25, sinks)
        assert_close(got, made.wanted(sinks=sinks, softmax_scale=0.25), made.rows)
        assert got[0][made.rows :].eq(0).all()


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_paths_agree(layout: str, where: str) -> None:
    made = setup(
        [3, 0, 1], [18, 5, 16], heads=(2, 1), dims=(16, 16), page_size=16, layout=layout, dtype=torch.float8_e4m3fn,
        kind="per-token-head", device=where, spare=1,
    )  # fmt: skip
    sinks = sinks_of("on", 2, where)
    for window in (None, 4):
        wanted, wanted_lse = made.attend(made.batch(), window=window, sinks=sinks, path="gather")
        out, lse = made.attend(made.batch(), window=window, sinks=sinks, path="direct")
        assert error(out, wanted.double()) <= 1e-2
        torch.testing.assert_close(lse[:4], wanted_lse[:4], rtol=1e-2, atol=1e-2)
