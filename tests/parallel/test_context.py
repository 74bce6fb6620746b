"""Attention over pages that are distributed over ranks, against one process with all pages in one pool."""

from __future__ import annotations

import pytest

from tests.parallel._context_child import CASES
from tests.parallel.gloo import Rank, run_ranks

SIZES = (2, 3)


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} ranks")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    """All ranks, after they have run every case."""
    return run_ranks("tests.parallel._context_child", request.param, tmp_path_factory.mktemp("context"), 300)


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_what_one_process_gives(ended: list[Rank], case: str) -> None:
    for rank, done in enumerate(ended):
        assert done.said is not None and case in done.said, f"rank {rank} did not come to it: {done.text[-2000:]}"
        assert done.said[case] == "", f"rank {rank}"


def test_every_rank_ends_well(ended: list[Rank]) -> None:
    assert [done.code for done in ended] == [0] * len(ended), "\n".join(done.text[-2000:] for done in ended)
