"""Attention straight from the pages is what the formula says over what the pages hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.cases import sinks_of
from tests.attention.batches import Setup, assert_close, error
from tests.attention.direct_cases import MIXES, Case, filled, pairwise
from tests.where import on_each_device

pytestmark = pytest.mark.triton


def attend(made: Setup, tile: tuple[int, int] | None = (16, 1), **more: Any) -> tuple[Tensor, Tensor]:
    """What is under test; `tile` is keys at a time and splits, of the smallest tile there is."""
    from kvgather.attention.direct import Tile, direct_attention

    cut = None if tile is None else Tile(16, tile[0], num_warps=4, num_stages=2, splits=tile[1])
    batch = more.pop("batch", None) or made.batch()
    scale = more.pop("softmax_scale", made.cache.geometry.head_dim**-0.5)
    return direct_attention(more.pop("q", made.q), made.cache, batch, softmax_scale=scale, tile=cut, **more)


def assert_spare_rows_are_empty(made: Setup, got: tuple[Tensor, Tensor], sinks: Tensor | None = None) -> None:
    out, lse = (tensor[made.rows :] for tensor in got)
    assert len(out) == made.spare and out.eq(0).all()
    assert (lse.eq(-math.inf) if sinks is None else lse.eq(sinks)).all()


@on_each_device
@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_any_two_of_what_it_compiles_for(case: Case, where: str) -> None:
    new, cached = MIXES[case.mix]
    made = filled(
        new, cached, (case.k_kind, case.v_kind), heads=case.heads, dims=case.dims, page_size=case.page_size,
        layout=case.layout, dtype=case.dtype, device=where, spare=2,
        q_dtype=torch.float32 if where == "cpu" else torch.bfloat16,
    )  # fmt: skip
    sinks = sinks_of(case.sinks, case.heads[0], where)
    got = attend(made, case.tile, window=case.window, sinks=sinks)
    assert_close(got, made.wanted(window=case.window, sinks=sinks), made.rows)
    assert_spare_rows_are_empty(made, got, sinks)
    if case.sinks == "very large":
        assert got[0].eq(0).all()


@on_each_device
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("which", ["on", "off"])
def test_rows_do_not_depend_on_whether_the_log_sum_exp_is_wanted(splits: int, which: str, where: str) -> None:
    made = filled(
        [1, 1, 2], [5, 0, 37], heads=(3, 1), dims=(16, 5), page_size=4, dtype=torch.float8_e4m3fn, device=where, spare=3
    )
    sinks = sinks_of(which, 3, where)
    out, _ = attend(made, (16, splits), sinks=sinks)
    for _ in range(2):  # the second call launches from addresses alone
        alone, lse = attend(made, (16, splits), sinks=sinks, want_lse=False)
        assert torch.equal(alone, out)
        assert (lse is None) == (splits > 1)


@on_each_device
@pytest.mark.parametrize("mix", [([1, 1, 1], [0, 16, 37]), ([5, 16], [0, 0]), ([0, 2, 0], [9, 5, 0]), ([3, 0], [4, 0])])
@pytest.mark.parametrize("tile", [(16, 1), (16, 4), None], ids=str)
def test_decode_no_prefix_and_empty_sequences(
    mix: tuple[list[int], list[int]], tile: tuple[int, int] | None, where: str
) -> None:
    made = filled(*mix, heads=(3, 1), page_size=4, dtype=torch.float8_e4m3fn, device=where, spare=3)
    got = attend(made, tile)
    assert_close(got, made.wanted(), made.rows)
    assert_spare_rows_are_empty(made, got)


@on_each_device
def test_no_sequence_and_nothing_new(where: str) -> None:
    for new, cached in (([], []), ([0, 0], [5, 3])):
        for tile in ((16, 1), (16, 2), None):
            made = filled(new, cached, device=where, spare=5)
            got = attend(made, tile, batch=made.batch(max_q=0) if tile is None else made.batch(max_q=5))
            assert_spare_rows_are_empty(made, got)
    made = filled([], [], device=where)
    out, lse = attend(made)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)


@on_each_device
def test_a_window_as_long_as_the_keys_is_none(where: str) -> None:
    made = filled([3, 1], [20, 4], device=where)
    out, lse = attend(made)
    for window in (23, 24, 10**12):
        got = attend(made, window=window)
        assert torch.equal(got[0], out) and torch.equal(got[1], lse)


@on_each_device
@pytest.mark.parametrize("tile", [(16, 1), (16, 3)], ids=str)
@pytest.mark.parametrize("begins", [[0, 0, 0], [16, 32, 0], [5, 17, 0], [20, 32, 7], [24, 33, 9]], ids=str)
def test_going_on_from_a_state_gives_the_whole(begins: list[int], tile: tuple[int, int], where: str) -> None:
    """From 0, from a step's beginning, from between two, from the first new token, and from the very end."""
    made = filled(
        [4, 1, 2], [20, 32, 7], dtype=torch.float8_e4m3fn, heads=(4, 1), dims=(16, 24), page_size=3, device=where,
        spare=2,
    )  # fmt: skip
    begin = torch.tensor(begins, dtype=torch.int32, device=where)
    if begins == [24, 33, 9]:  # nothing is left: the state alone
        state = tuple(t.contiguous() for t in attend(made))
    else:
        state = state_before(made, begins)
    sinks = sinks_of("on", 4, where)
    got = attend(made, tile, begin=begin, state=state, sinks=sinks)
    assert_close(got, made.wanted(sinks=sinks), made.rows)
    assert_spare_rows_are_empty(made, got, sinks)


def state_before(made: Setup, begins: list[int]) -> tuple[Tensor, Tensor]:
    """What the rows of each sequence see of the keys before its begin; NaN in rows that see nothing, and spare ones."""
    k, v = (rows.double().split(made.total) for rows in made.held())
    heads = made.q.shape[1]
    out = torch.full((len(made.q), heads, v[0].shape[2]), torch.nan, device=made.q.device)
    lse = torch.full((len(made.q), heads), -math.inf, device=made.q.device)
    first = 0
    for sequence, (new, begin) in enumerate(zip(made.new, begins, strict=True)):
        if begin:
            keys, values = (t[sequence][:begin].repeat_interleave(heads // t[0].shape[1], 1) for t in (k, v))
            rows = slice(first, first + new)
            scores = torch.einsum("ihd,jhd->ihj", made.q[rows].double(), keys) * made.q.shape[2] ** -0.5
            out[rows] = torch.einsum("ihj,jhd->ihd", scores.softmax(-1), values).float()
            lse[rows] = scores.logsumexp(-1).float()
        first += new
    return out, lse


@on_each_device
def test_a_begin_without_a_state_leaves_the_rest_out(where: str) -> None:
    made = filled([2, 3], [20, 6], page_size=4, device=where)
    begins = [13, 6]
    begin = torch.tensor(begins, dtype=torch.int32, device=where)
    part = attend(made, begin=begin)
    merged = kg.merge_states(*part, *state_before(made, begins))
    assert_close(merged, made.wanted())


@on_each_device
def test_nan_in_a_state_stays(where: str) -> None:
    made = filled([2, 3], [20, 6], page_size=4, device=where)
    out, lse = attend(made)
    out[0], lse[0] = torch.nan, torch.nan
    for begins in ([22, 9], [22, 6]):
        begin = torch.tensor(begins, dtype=torch.int32, device=where)
        for tile in ((16, 1), (16, 2)):
            got, _ = attend(made, tile, begin=begin, state=(out, lse))
            assert got[0].isnan().all() and not got[1:].isnan().any()


def zero_is_stale(where: str, **more: Any) -> Setup:
    """Block 0, which a bad id is read from, if it is read, holds no sequence's token."""
    for seed in range(100):
        made = filled([3, 5, 2], [17, 30, 9], page_size=4, device=where, spare=1, seed=seed, **more)
        if 0 not in made.all_slots:
            return made
    raise AssertionError("no seed leaves block 0 free")


@on_each_device
@pytest.mark.parametrize(
    ("layout", "tile", "window"),
    [("NHD", (16, 1), None), ("SHUFFLE", (16, 3), None), ("HND", (64, 1), None),
     ("SHUFFLE", (16, 1), 6), ("NHD", (16, 3), 6), ("SHUFFLE", (64, 1), 6)],
    ids=str,
)  # fmt: skip
def test_rows_that_see_a_bad_block_are_nan_and_no_others(
    layout: str, tile: tuple[int, int], window: int | None, where: str
) -> None:
    made = zero_is_stale(where, layout=layout, heads=(2, 1))  # FP32: 4 slots of SHUFFLE's V lie together
    wanted, wanted_lse = (tensor[: made.rows] for tensor in made.wanted(window=window))
    position = torch.arange(30, 35, device=where)  # of sequence 1's new tokens, which are rows 3 to 7
    good_table = made.block_table.clone()
    for column, block_id in ((0, 10**6), (6, -1), (7, 10**6), (8, -1)):
        made.block_table.copy_(good_table)
        made.block_table[1, column] = block_id
        first = column * 4
        bad = torch.zeros(made.rows, dtype=torch.bool, device=where)
        bad[3:8] = (position >= first) & (True if window is None else position - window + 1 < first + 4)
        out, lse = (tensor[: made.rows] for tensor in attend(made, tile, window=window))
        assert out[bad].isnan().all() and lse[bad].isnan().all()
        assert error(out[~bad], wanted[~bad]) <= 1e-5
        torch.testing.assert_close(lse[~bad].double(), wanted_lse[~bad], rtol=1e-5, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("splits", [1, 3])
def test_a_bad_block_that_counts_for_nothing_is_nan_all_the_same(splits: int, where: str) -> None:
    """Beside other keys, or a sink, the share of its own is 0."""
    made = zero_is_stale(where, heads=(2, 1))
    made.block_table[1, 0] = 10**6
    for sinks in (None, torch.full((2,), 1e4, device=where)):
        made.q *= 100
        out, _ = attend(made, (16, splits), sinks=sinks)
        assert out[3:8].isnan().all() and not out[:3].isnan().any() and not out[8:].isnan().any()


@on_each_device
def test_a_sequence_past_its_table_is_nan_where_it_ends(where: str) -> None:
    from dataclasses import replace

    made = filled([3, 2], [14, 3], page_size=4, device=where)
    batch = made.batch()
    batch = replace(batch, block_table=batch.block_table[:, :4].contiguous())  # PrefixBatch.build lets none through
    for tile in ((16, 1), (16, 2), (32, 1)):
        out, _ = attend(made, tile, batch=batch)
        assert out[2].isnan().all() and not out[:2].isnan().any() and not out[3:].isnan().any()
    out, _ = attend(made, batch=made.batch(False, max_q=3, max_k=5))
    assert out[:3].isnan().all() and not out[3:].isnan().any()


@on_each_device
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [(16, 1), (16, 2)], ids=str)
def test_a_row_of_any_size(q_dtype: torch.dtype, tile: tuple[int, int], where: str) -> None:
    made = filled([6], [20], dtype=torch.float8_e4m3fn, q_dtype=q_dtype, heads=(2, 1), device=where)
    sizes = [1e-30, 1e30, 1e-40, 0.0, 1e15, 1.0]
    for row, size in enumerate(sizes):
        made.q[row] *= size
    for window in (None, 7):
        got = attend(made, tile, window=window)
        wanted = made.wanted(window=window)
        for row in range(len(sizes)):
            assert_close(*(tuple(t[row : row + 1] for t in pair) for pair in (got, wanted)))


@on_each_device
def test_a_row_of_nan_or_infinity_is_alone(where: str) -> None:
    made = filled([6], [20], dtype=torch.float8_e4m3fn, heads=(2, 1), device=where)
    wanted = made.wanted()
    for row, value in ((0, math.nan), (2, math.inf), (4, -math.inf)):
        made.q[row, 1, 3] = value
    good = torch.ones(6, 2, dtype=torch.bool, device=where)
    good[[0, 2, 4], 1] = False
    for tile in ((16, 1), (16, 2)):
        out, lse = attend(made, tile)
        assert out[~good].isnan().all() and lse[~good].isnan().all()
        assert error(out[good], wanted[0][good]) <= 1e-5
        torch.testing.assert_close(lse[good].double(), wanted[1][good], rtol=1e-5, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("splits", [1, 3])
def test_sinks_of_any_dtype_and_stride(splits: int, where: str) -> None:
    made = filled([3, 1], [20, 4], heads=(4, 1), device=where)
    many = torch.linspace(-2, 2, 8, device=where)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for sinks in (many.to(dtype)[::2], torch.tensor(0.5, dtype=dtype, device=where).expand(4)):
            assert_close(attend(made, (16, splits), sinks=sinks), made.wanted(sinks=sinks))


@on_each_device
def test_rows_of_q_may_be_views(where: str) -> None:
    made = filled([3, 4], [20, 4], device=where)
    wanted = made.wanted()
    packed = torch.zeros(7, 9, 8, device=where)
    packed[:, 2:6] = made.q
    for q in (packed[:, 2:6], made.q.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_close(attend(made, q=q), wanted)


@on_each_device
def test_16_bit_rows(where: str) -> None:
    for dtype in (torch.float8_e5m2, torch.bfloat16, torch.float16):
        for q_dtype, splits in ((torch.bfloat16, 1), (torch.float16, 2)):
            made = filled([3, 1], [20, 4], dtype=dtype, heads=(2, 1), q_dtype=q_dtype, device=where)
            got = attend(made, (16, splits))
            assert got[0].dtype == q_dtype
            assert_close(got, made.wanted())
