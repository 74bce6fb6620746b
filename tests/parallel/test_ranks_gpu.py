"""The ranks of test_context and test_missing with NCCL, one process for each GPU; two share a GPU that is alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvgather.parallel.ranks import DEAD
from tests.parallel._context_child import CASES
from tests.parallel.gloo import run_ranks

PARTS = 8
"""Tests that the cases are divided over: each kind of pool takes seconds to compile."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; tests/parallel/test_context.py has gloo"),
]


@pytest.mark.parametrize("first", range(PARTS))
def test_ranks_give_what_one_gpu_gives(first: int, tmp_path: Path) -> None:
    size = max(2, torch.cuda.device_count())
    cases = list(CASES)[first::PARTS]
    ranks = run_ranks(
        "tests.parallel._context_child", size, tmp_path, 200, RANKS_ON="cuda", RANKS_CASES=f"{first} {PARTS}"
    )
    for rank, done in enumerate(ranks):
        assert done.code == 0, done.text[-3000:]
        wrong = {case: said for case, said in done.said.items() if said}
        assert list(done.said) == cases and not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize(
    "how, state",
    [("dies", f"has died, or stands still: it gave no sign for {DEAD:.2g} s"), ("hangs", "hangs, or does something")],
    ids=["dies", "hangs"],
)
def test_a_missing_rank_is_named_and_the_others_end(how: str, state: str, tmp_path: Path) -> None:
    """The host does not wait for a GPU: the name is on stderr, the GPU ends its wait, and the next call raises.

    A dead rank is reported before the collective is late. On one GPU, torch's own watchdog does not handle errors, see
    `gloo.join`: that it would end the process is not part of this test.
    """
    ended = run_ranks(
        "tests.parallel._missing_child", 2, tmp_path, 200, waits_for=0, RANKS_ON="cuda", MISSING=f"{how} 1"
    )
    assert ended[0].code == 3, ended[0].text
    assert ended[0].said["ranks"] == [1] and ended[0].said["call"] == 4
    said = f"kvgather: rank 0: the all-gather of attention states of 2 ranks failed: rank 1 {state}"
    assert said in ended[0].text, ended[0].text
