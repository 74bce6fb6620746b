"""Ranks as child processes: their answers, errors and ends, and what chapter 10 runs on them."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import kvgather as kg
from kvgather.batch.share import Share
from kvgather.workbook.dealt import Dealt, deal
from kvgather.workbook.ranks_run import RanksError, each_rank, run_ranks

NUMBERS: dict[str, Any] = {
    "cached": (13, 4, 0), "new": (1, 3, 2), "page_size": 2, "q_heads": 4, "kv_heads": 2, "dim": 8, "seed": 0,
}  # fmt: skip
JOBS = "kvgather.workbook.ranks_jobs"


def total(rank: int, ranks: int, values: list[int]) -> dict[str, int]:
    """A job: the sum over all ranks of one value each."""
    sum_of_all = torch.tensor(values[rank])
    dist.all_reduce(sum_of_all)
    return {"rank": rank, "ranks": ranks, "total": int(sum_of_all)}


def misbehave(rank: int, ranks: int, ways: list[str]) -> str:
    """A job: end as its way says."""
    if ways[rank] == "raises":
        raise ValueError("no such page")
    if ways[rank] == "waits":
        dist.barrier()
    if ways[rank] == "ends":
        os._exit(7)
    if ways[rank] == "hangs":
        time.sleep(600)
    return ways[rank]


def test_every_rank_answers() -> None:
    answers = run_ranks(f"{__name__}:total", 2, values=(3, 4))
    assert answers == [{"rank": rank, "ranks": 2, "total": 7} for rank in range(2)]


def test_how_each_rank_ended() -> None:
    ended = {end.rank: end for end in each_rank(f"{__name__}:misbehave", 3, ways=["raises", "ends", "is well"])}
    assert [ended[rank].code for rank in range(3)] == [1, 7, 0]
    assert [ended[rank].answer for rank in range(3)] == [None, None, "is well"]
    assert ended[0].stderr.strip().endswith("ValueError: no such page")


def test_a_rank_that_hangs_is_killed_once_the_others_have_ended() -> None:
    begin = time.monotonic()
    ended = list(each_rank(f"{__name__}:misbehave", 2, ways=["is well", "hangs"], awaited=[0]))
    assert [(end.rank, end.code) for end in ended] == [(0, 0)] and time.monotonic() - begin < 50


def test_the_time_limit_ends_all() -> None:
    with pytest.raises(RanksError, match="rank 0: no answer in 6 s"):
        run_ranks(f"{__name__}:misbehave", 1, timeout=6, ways=["hangs"])


def test_a_rank_that_raises_is_an_error() -> None:
    with pytest.raises(RanksError, match="rank 0: exit status 1, and wrote ValueError: no such page"):
        run_ranks(f"{__name__}:misbehave", 1, ways=["raises"])


def test_the_rank_that_fails_first_is_told_first() -> None:
    """The other one fails because of it."""
    with pytest.raises(RanksError) as raised:
        run_ranks(f"{__name__}:misbehave", 2, ways=["waits", "raises"])
    told = sorted(str(raised.value).splitlines())
    assert len(told) == 2 and told[0].startswith("rank 0: exit status 1, and wrote ")
    assert told[1] == "rank 1: exit status 1, and wrote ValueError: no such page"


@pytest.mark.parametrize(
    ("job", "ranks", "more", "error", "said"),
    [
        ("module", 2, {}, ValueError, "job is str 'module'; accepted: 'module:function'"),
        ("module:f", 0, {}, ValueError, "ranks is 0"),
        ("module:f", 2, {"timeout": 0}, ValueError, "timeout is 0"),
        ("module:f", 2, {"group_timeout": -1}, ValueError, "group_timeout is -1"),
        ("module:f", 2, {"awaited": [2]}, ValueError, r"awaited is list \[2\]; accepted: one or more of the ranks 0"),
        ("module:f", 2, {"awaited": []}, ValueError, "awaited is list"),
        ("module:f", 2, {"x": torch.ones(1)}, TypeError, "accepted: what JSON can hold"),
    ],
)
def test_wrong_arguments_start_nothing(
    job: str, ranks: int, more: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        each_rank(job, ranks, **more)


def test_pages_are_dealt_in_turn() -> None:
    assert deal([5, 2, 0], page_size=2, ranks=2).tolist() == [[0, 0, 1], [2, -1, -1], [-1, -1, -1]]
    assert deal([5, 2, 0], page_size=2, ranks=1).tolist() == [[0, 1, 2], [3, -1, -1], [-1, -1, -1]]
    assert deal([], page_size=2, ranks=3).tolist() == []


def test_dealt_pools_have_the_bytes_of_one_pool() -> None:
    one, two = Dealt(**NUMBERS, ranks=1), Dealt(**NUMBERS, ranks=2)
    whole = one.pool().key_cache.view(torch.uint8)
    pools = [two.pool(Share(rank, 2)).key_cache.view(torch.uint8) for rank in range(2)]
    for sequence, cached in enumerate(NUMBERS["cached"]):
        for column in range(-(-cached // 2)):
            mine, theirs = int(two.block_table[sequence, column]), int(one.block_table[sequence, column])
            assert torch.equal(pools[column % 2][mine], whole[theirs])


def test_the_live_ranks_of_the_chapter_give_what_one_process_gives() -> None:
    answers = run_ranks(f"{JOBS}:attend_batches", 2, batches={"some": {**NUMBERS, "ranks": 2}}, sink=0.5)
    one = Dealt(**NUMBERS, ranks=1)
    q, k, v = one.rows()
    new = one.is_new()
    expected = kg.prefix_attention(q, k[new], v[new], one.pool(), one.batch(), sinks=torch.full((4,), 0.5))
    for answer in answers:
        torch.testing.assert_close(torch.tensor(answer["some"]["out"]), expected, rtol=0, atol=1e-5)
        assert answer["some"]["received"] == 6 * 4 * (8 * 4 + 4) and answer["some"]["least"] > 0


@pytest.mark.parametrize("way", ["dies", "hangs"])
def test_the_lost_rank_is_named_by_all_others(way: str) -> None:
    settings: dict[str, Any] = {"batch": {**NUMBERS, "ranks": 3}, "lost": 2, "way": way, "seconds": 2}
    ended = [end for end in each_rank(f"{JOBS}:lose_a_rank", 3, awaited=[0, 1], **settings) if end.rank != 2]
    assert [end.answer["ranks"] for end in ended] == [[2], [2]], [end.stderr for end in ended]
    assert all(f"rank 2 {'has died' if way == 'dies' else 'hangs'}" in end.answer["message"] for end in ended)
