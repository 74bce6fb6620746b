"""A rank that dies, hangs or raises: the others raise within the group's time-out, name it, and exit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel._missing_child import LAST, SECONDS
from tests.parallel.gloo import run_ranks

MODULE = "tests.parallel._missing_child"


@pytest.mark.parametrize("size, which", [(2, 1), (3, 1), (3, 2)])
def test_a_dead_rank(size: int, which: int, tmp_path: Path) -> None:
    ended = run_ranks(MODULE, size, tmp_path, 60, MISSING=f"dies {which}")
    assert ended[which].code == 7
    for rank, done in enumerate(ended):
        if rank != which:
            assert done.code == 3 and done.said is not None, done.text[-2000:]
            assert done.said["call"] >= LAST
            assert which in done.said["ranks"]
            assert f"rank {which} has died" in done.said["text"]
            assert done.said["seconds"] < 2 * SECONDS


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    """It is killed at the end, by the test: nothing else ends it."""
    ended = run_ranks(MODULE, 2, tmp_path, 60, waits_for=0, MISSING="hangs 1")
    assert ended[0].code == 3 and ended[0].said is not None, ended[0].text[-2000:]
    assert ended[0].said["call"] == LAST and ended[0].said["ranks"] == [1]
    assert ended[0].said["seconds"] < 2 * SECONDS
    assert (
        f"rank 1 hangs, or does something else: it has entered {LAST - 1} of {LAST} collectives"
        in (ended[0].said["text"])
    )


def test_a_rank_that_raises_leaves_the_others_with_its_name(tmp_path: Path) -> None:
    ended = run_ranks(MODULE, 2, tmp_path, 60, MISSING="raises 0")
    assert ended[0].code == 1 and "sinks has shape [3]; accepted for 4 query heads" in ended[0].text
    assert ended[1].code == 3 and ended[1].said is not None, ended[1].text[-2000:]
    assert 0 in ended[1].said["ranks"] and ended[1].said["seconds"] < 2 * SECONDS
