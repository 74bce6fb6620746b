"""CheckedBatch: what layers ask of a batch, by hand with pages of 4, and what is made once for all of them."""

from __future__ import annotations

import pytest
import torch

import kvgather as kg
from kvgather.batch.checked import CheckedBatch
from kvgather.batch.lengths import STEP

TABLE = [[7, 2, 5], [0, 9, 3], [4, 6, 8]]
NEW, TOTAL = [2, 1, 0], [9, 5, 3]


def batch(known: bool = True, new: list[int] = NEW, total: list[int] = TOTAL, table: object = TABLE) -> CheckedBatch:
    lengths = {"seqlens_q": new, "seqlens_k": total} if known else {"total_q": sum(new), "total_k": sum(total)}
    made = kg.PrefixBatch.build(
        torch.tensor(table), kg.cu_seqlens(new), kg.cu_seqlens(total), page_size=4, num_blocks=10, **lengths
    )
    assert isinstance(made, CheckedBatch)
    return made


@pytest.mark.parametrize("known", [True, False], ids=["lengths", "bounds"])
def test_lengths_on_the_device(known: bool) -> None:
    made = batch(known)
    assert made.lens_q.tolist() == NEW and made.lens_k.tolist() == TOTAL
    assert made.plan is made.plan is made.everything.plan and made.plan.total_tokens == 17
    assert made.num_sequences == 3 and made.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        (None, [9, 5, 0]),  # the third has no new token, which could see any
        (1, [2, 1, 0]),  # each new token sees itself
        (3, [4, 3, 0]),  # the first of 2 new tokens sees two before it
        (100, [9, 5, 0]),
    ],
)
def test_the_host_and_the_device_say_the_same_of_a_window(window: int | None, seen: list[int]) -> None:
    made = batch()
    assert made.visible_lens_on_host(window) == tuple(seen)
    assert made.visible_lens(window).tolist() == seen and made.visible_lens(window).dtype == torch.int32
    unknown = batch(known=False)
    assert unknown.visible_lens_on_host(window) is None and unknown.visible_lens(window).tolist() == seen


def test_what_all_have_cached_is_a_multiple_of_the_step() -> None:
    assert batch().common_cached == batch(known=False).common_cached == 0
    table = [list(range(STEP))] * 3
    for new, cached, common in (
        ([5, 1, 0], [STEP + 7, 2 * STEP - 9, 3], STEP),  # the third has nothing new, so it does not count
        ([5, 1, 1], [STEP + 7, 2 * STEP - 9, 3], 0),
        ([5, 1, 1], [STEP - 1, 2 * STEP, 2 * STEP], 0),
        ([0, 0, 0], [STEP, STEP, STEP], 0),
    ):
        total = [n + c for n, c in zip(new, cached, strict=True)]
        assert batch(new=new, total=total, table=table).common_cached == common


def test_a_plan_of_some_sequences_from_their_positions_on() -> None:
    made = batch()
    plan = made.plan_of(torch.tensor([0, 3], dtype=torch.int32), 3, torch.tensor([2], dtype=torch.int32), slice(1, 2))
    assert [record for record in plan.records.tolist() if record[2]] == [[0, 0, 2, 2], [9, 2, 1, 0]]
    assert plan.total_tokens == 3


def test_what_layers_share_is_made_once() -> None:
    made, calls = batch(), []

    def make() -> list[int]:
        calls.append(1)
        return calls

    assert made.once("key", make, "something") is made.once("key", make, "something") is calls and len(calls) == 1
    assert made.recall("key") is None, "what the host decided is kept apart"
    assert made.decided("key", make) is made.decided("key", make) is made.recall("key") and len(calls) == 2
    assert made.for_window(3) is made.for_window(3) is made.windows[3]
    assert made.for_window(None) is made.everything
