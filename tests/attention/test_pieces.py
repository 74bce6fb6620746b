"""Any context in bounded memory: which pieces a batch is cut into, and that nobody can tell from the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention import pieces as cutting
from kvgather.attention import prefix
from kvgather.attention.pieces import in_pieces
from kvgather.batch.pieces import Piece, Pieces
from tests.attention.batches import Setup, assert_close, setup


def positions(made: Setup, piece: Piece) -> list[list[int]]:
    """The positions of each sequence that a piece gathers, found by the blocks that it names."""
    page = made.cache.geometry.page_size
    where = {
        int(block): (sequence, column)
        for sequence, row in enumerate(made.block_table.tolist())
        for column, block in enumerate(row[: -(-made.total[sequence] // page)])
    }
    found: list[list[int]] = [[] for _ in made.total]
    for block, _, rows, begin in piece.plan.records.tolist():
        if rows:
            sequence, column = where[block]
            found[sequence] += [column * page + begin + i for i in range(rows)]
    return found


def cut(pieces: Pieces, made: Setup) -> list[tuple[list[Any], list[tuple[int, int, bool]]]]:
    """Each piece: [first position, one past the last] of each sequence with any, and rows and mask of each call."""
    told = []
    for piece in pieces.pieces:
        spans = [[p[0], p[-1] + 1] for p in positions(made, piece) if p]
        told.append((spans, [(a.rows.start, a.rows.stop, a.causal) for a in piece.attends]))
    return told


def test_sequences_lie_side_by_side_while_they_fit() -> None:
    made = setup([2, 1, 2, 1], [6, 6, 3, 9])
    pieces = in_pieces(made.batch(), None, 15)
    assert cut(pieces, made) == [
        ([[0, 8], [0, 7]], [(0, 3, True)]),
        ([[0, 5], [0, 10]], [(3, 6, True)]),
    ]
    assert not pieces.merged and pieces.capacity == 15


def test_a_long_sequence_is_cut_along_its_keys() -> None:
    made = setup([1, 2, 1], [2, 9, 3])
    pieces = in_pieces(made.batch(), None, 4)
    assert cut(pieces, made) == [
        ([[0, 3]], [(0, 1, False)]),
        ([[0, 4]], [(1, 3, False)]),
        ([[4, 8]], [(1, 3, False)]),
        ([[8, 11]], [(1, 3, True)]),  # what is left of the cached part, with the new tokens
        ([[0, 4]], [(3, 4, False)]),
    ]
    assert pieces.merged and pieces.capacity == 4


def test_new_tokens_that_do_not_fit_are_cut_too() -> None:
    made = setup([6], [10])
    assert cut(in_pieces(made.batch(), None, 4), made) == [
        ([[0, 4]], [(0, 6, False)]),
        ([[4, 8]], [(0, 6, False)]),
        ([[8, 10]], [(0, 6, False)]),
        ([[10, 14]], [(0, 4, True), (4, 6, False)]),  # those behind it see all of it
        ([[14, 16]], [(4, 6, True)]),
    ]


def test_what_all_have_cached_is_cut_into_equal_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "STEP", 4)
    made = setup([2, 0, 1, 1], [9, 20, 17, 24])
    pieces = in_pieces(made.batch(), None, 13)
    assert cut(pieces, made) == [
        ([[0, 4], [0, 4], [0, 4]], [(0, 4, False)]),
        ([[4, 8], [4, 8], [4, 8]], [(0, 4, False)]),
        ([[8, 11], [8, 18]], [(0, 3, True)]),  # the second sequence has nothing new
        ([[8, 21]], [(3, 4, False)]),
        ([[21, 25]], [(3, 4, False)]),
    ]
    assert pieces.merged and pieces.capacity == 13
    for tokens in (13, 12, 17, 29):
        assert_close(made.attend(made.batch(), workspace_tokens=tokens), made.wanted(raw=True))


def test_a_window_is_cut_along_the_new_tokens() -> None:
    made = setup([6, 1, 1], [10, 8, 0])
    pieces = in_pieces(made.batch(), 3, 4)
    assert cut(pieces, made) == [
        ([[8, 12]], [(0, 2, True)]),
        ([[10, 14]], [(2, 4, True)]),
        ([[12, 16]], [(4, 6, True)]),
        ([[6, 9], [0, 1]], [(6, 8, False)]),
    ]
    assert not pieces.merged


def test_unknown_lengths_are_cut_from_the_end_on() -> None:
    made = setup([3, 1], [4, 2])
    pieces = in_pieces(made.batch(lengths=False, max_q=3, max_k=7), None, 4)
    assert cut(pieces, made) == [
        ([[5, 7], [1, 3]], [(0, 4, True)]),
        ([[3, 5], [0, 1]], [(0, 4, True), (0, 4, False)]),  # new tokens lie behind it, and in it
        ([[1, 3]], [(0, 4, False)]),
        ([[0, 1]], [(0, 4, False)]),
    ]


def test_what_fits_is_one_piece() -> None:
    batch = setup([3, 1], [4, 2]).batch()
    assert in_pieces(batch, None, 10).pieces == (batch.everything,)
    assert in_pieces(batch, None, None).pieces == (batch.everything,)
    assert in_pieces(batch, 2, 6).pieces == (batch.windows[2],)


@pytest.mark.parametrize(
    ("lengths", "window", "tokens", "message"),
    [
        (True, 5, 4, r"workspace_tokens is 4; accepted for a window of 5: 5 or more"),
        (False, None, 1, r"workspace_tokens is 1; accepted for 2 sequences of unknown lengths: 2 or more"),
        (
            False,
            3,
            5,
            r"workspace_tokens is 5; accepted for 2 sequences of unknown lengths and a window of 3: 6 or more",
        ),
    ],
)
def test_a_workspace_that_is_too_small(lengths: bool, window: int | None, tokens: int, message: str) -> None:
    batch = setup([9, 9], [4, 2]).batch(lengths)
    with pytest.raises(ValueError, match=message):
        in_pieces(batch, window, tokens)
    with pytest.raises(ValueError, match=message):
        in_pieces(batch, window, tokens)


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_workspace_gives_the_same(q_dtype: torch.dtype, dtype: torch.dtype, lengths: bool) -> None:
    made = setup([7, 1, 3], [30, 61, 0], page_size=16, dims=(16, 8), dtype=dtype, q_dtype=q_dtype, spare=2)
    sinks = torch.linspace(-1, 3, 4)
    made.attend(made.batch())
    for window in (None, 5):
        wanted = made.wanted(sinks=sinks, window=window)
        for tokens in (15, 16, 17, 24, 40, 64, 200):  # most split a page
            got = made.attend(made.batch(lengths), sinks=sinks, window=window, workspace_tokens=tokens)
            assert got[0].dtype == q_dtype
            assert_close(got, wanted, made.rows)
            assert got[0][made.rows :].eq(0).all()


@pytest.mark.parametrize("sink", [0.0, 4.0, 1e4, -1e4])
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
def test_the_sink_enters_once(sink: float, lengths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup([5, 2], [40, 11])
    sinks = torch.full((4,), sink)
    calls = []
    apply_sinks = prefix.apply_sinks

    def counted(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        return apply_sinks(*arguments)

    monkeypatch.setattr(prefix, "apply_sinks", counted)
    for tokens in (4, 7, 16, 45, None):
        calls.clear()
        assert_close(
            made.attend(made.batch(lengths), sinks=sinks, workspace_tokens=tokens),
            made.wanted(raw=True, sinks=sinks),
        )
        assert len(calls) == 1


def test_scores_that_are_far_apart_from_piece_to_piece() -> None:
    made = setup([3], [60])
    made.q *= 200  # log-sum-exps in the hundreds, of either sign
    for tokens in (3, 8, 30):
        got = made.attend(made.batch(), workspace_tokens=tokens)
        assert_close(got, made.wanted(raw=True))


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("window", [None, 6])
def test_every_piece_is_gathered_into_the_same_workspace(
    window: int | None, lengths: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup([9, 3], [90, 57])
    filled: list[tuple[int, int]] = []
    gather = kg.PagedKVCache.gather_for_attention

    def recorded(cache: kg.PagedKVCache, plan: kg.GatherPlan, **arguments: Any) -> tuple[Tensor, Tensor]:
        k, v = arguments["out"]
        filled.append((k.data_ptr(), v.data_ptr()))
        assert len(k) <= 16 and len(v) <= 16 and plan.total_tokens <= len(k)
        return gather(cache, plan, **arguments)

    monkeypatch.setattr(kg.PagedKVCache, "gather_for_attention", recorded)
    made.attend(made.batch(lengths), window=window, workspace_tokens=16)
    assert len(filled) > 1 and len(set(filled)) == 1


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "bounds"])
def test_a_window_gathers_as_much_behind_any_prefix(lengths: bool) -> None:
    gathered = set()
    for cached in (100, 1000, 5000):
        made = setup([4, 1], [cached, cached], page_size=64, heads=(1, 1), dims=(1, 1))
        batch = made.batch(lengths)
        gathered.add(
            (batch.for_window(16).plan.total_tokens, batch.for_window(16).attends[0].cu_seqlens_k.tolist()[-1])
        )
    assert gathered == {(5 + 2 * 15, 5 + 2 * 15)}


def test_pieces_are_made_once_for_all_layers() -> None:
    made = setup([5, 2], [40, 11])
    batch = made.batch()
    made.attend(batch, workspace_tokens=16)
    first = batch.once((None, 16), lambda: pytest.fail("it should be there"), "pieces")
    made.attend(batch, workspace_tokens=16)
    assert batch.once((None, 16), lambda: None, "pieces") is first
