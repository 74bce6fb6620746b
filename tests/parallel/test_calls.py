"""Calls of `ContextParallel` that are refused, groups within a group, block ids that no rank has, other shapes."""

from __future__ import annotations

import pytest

from tests.parallel.gloo import Rank, run_ranks

MODULE, SIZE = "tests.parallel._calls_child", 3
REFUSED = [
    "ValueError: batch has the share Share(rank={next}, ranks=3)", "ValueError: batch has the share Share(rank={rank}, "
    "ranks=4)", "TypeError: batch is str 'junk'", "TypeError: q is NoneType None", "ValueError: q has shape [2, 4, 8]",
    "TypeError: q has dtype float64", "ValueError: q has shape [3, 3, 8]", "ValueError: q has shape [4, 8]",
    "ValueError: sinks has shape [3]", "ValueError: sinks has shape [1, 4]", "TypeError: sinks has dtype float64",
    "TypeError: sinks is list [", "ValueError: q has shape [4, 8]", "ValueError: window is 0",
    "ValueError: path is 'ring'", "ValueError: softmax_scale is 0.0",
]  # fmt: skip
EXPECTED = {
    "negative_bits": True, "ends_at_borders": [], "bad_blocks": [], "too_long": True, "what_no_rank_sees": True,
    "a_short_window_stays_local": [0, 0, True],
    "two_of_one_group": [[], [], "this ContextParallel is closed; accepted: calls before close()", True],
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    ranks = run_ranks(MODULE, SIZE, tmp_path_factory.mktemp("calls"), 120)
    assert [rank.code for rank in ranks] == [0] * SIZE, "\n".join(rank.text[-2000:] for rank in ranks)
    return ranks


@pytest.mark.parametrize("name", EXPECTED)
def test_on_all_ranks(ended: list[Rank], name: str) -> None:
    assert [rank.said[name] for rank in ended] == [EXPECTED[name]] * SIZE


def test_wrong_calls_are_refused_by_name_and_send_nothing(ended: list[Rank]) -> None:
    for rank, done in enumerate(ended):
        expected = [text.format(rank=rank, next=(rank + 1) % SIZE) for text in REFUSED]
        got = done.said["refused_calls"]
        assert len(got) == len(expected)
        for text, begin in zip(got, expected, strict=True):
            assert text.startswith(begin), (text, begin)


def test_a_group_of_some_ranks(ended: list[Rank]) -> None:
    assert [rank.said["part_of_the_group"] for rank in ended] == [
        "group is int -100; accepted: None, or a ProcessGroup that has this process",
        "rank 0 of 2, True, 1 call", "rank 1 of 2, True, 1 call",
    ]  # fmt: skip


def test_torch_finds_ranks_that_call_with_other_shapes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the docstring of `ContextParallel` says."""
    ranks = run_ranks(MODULE, 2, tmp_path_factory.mktemp("shapes"), 60, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    for rank, done in enumerate(ranks):
        assert done.said is not None, done.text[-2000:]
        assert f"rank {rank}: the all-gather of attention states of 2 ranks failed" in done.said["other_shapes"]
        assert "Detected mismatch between collectives on ranks" in done.said["other_shapes"]
