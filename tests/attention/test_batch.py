"""PrefixBatch: slots, tables and windows worked out on paper with pages of 4, and everything that can be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.attention.batch import PrefixBatch
from kvgather.plan import PlanError
from tests.where import nothing_waits

PAGE, BLOCKS = 4, 10
TABLE = [[7, 2, 5], [0, 9, 3]]
INT64_MAX = 2**63 - 1


def build(
    table: list[list[int]],
    q: list[int],
    k: list[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.int64,
    **more: Any,
) -> PrefixBatch:
    def tensor(numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)

    rows = tensor(table) if table else torch.empty((0, 3), dtype=dtype, device=device)
    return PrefixBatch.build(rows, tensor(q), tensor(k), page_size=PAGE, num_blocks=BLOCKS, **more)


def used(plan: kg.GatherPlan) -> list[tuple[int, ...]]:
    """The records that name rows: (block, first row, rows, offset of the first row in its page)."""
    return [tuple(record) for record in plan.records.tolist() if record[2]]


@pytest.mark.parametrize(
    ("q", "k", "slots"),
    [
        ([0, 5, 8], [0, 5, 8], [28, 29, 30, 31, 8, 0, 1, 2]),  # nothing cached
        ([0, 1, 2], [0, 9, 14], [20, 36]),  # decode
        ([0, 3, 3], [0, 6, 6], [31, 8, 9]),  # across the edge of a page; the second is empty
        ([0, 0, 2], [0, 6, 14], [38, 39]),  # cached alone; the last slots of a page
        ([0, 0, 0], [0, 6, 14], []),
    ],
)
def test_slots_by_hand(q: list[int], k: list[int], slots: list[int]) -> None:
    for dtype in (torch.int32, torch.int64):
        for spare in (0, 3):
            batch = build(TABLE, q, k, dtype=dtype, total_q=q[-1] + spare, total_k=k[-1] + spare)
            assert batch.slots.tolist() == slots + [-1] * spare
            assert batch.slots.dtype == torch.int64
            assert used(batch.plan) == used(kg.GatherPlan.build(
                torch.tensor(TABLE), torch.tensor(k), page_size=PAGE, num_blocks=BLOCKS))  # fmt: skip
            assert batch.plan.total_tokens == batch.total_k == k[-1] + spare
            for offsets, given in ((batch.cu_seqlens_q, q), (batch.cu_seqlens_k, k)):
                assert offsets.tolist() == given and offsets.dtype == torch.int32 and offsets.is_contiguous()
            batch.check()


def test_the_checked_table_names_a_block_only_where_there_are_tokens() -> None:
    batch = build([[7, -5, INT64_MAX], [0, 9, 3]], [0, 1, 2], [0, 4, 9])
    assert batch.block_table.tolist() == [[7, -1, -1], [0, 9, -1]]
    assert batch.block_table.dtype == torch.int32 and batch.block_table.is_contiguous()
    assert batch.num_sequences == 2 and batch.device == torch.device("cpu")
    batch.check()


@pytest.mark.parametrize(
    ("window", "records"),
    [
        (1, [(2, 0, 1, 3), (5, 1, 1, 0), (9, 2, 1, 0)]),  # of 9 tokens, 2 new: the last 2; of 5, 1 new: the last
        (3, [(2, 0, 3, 1), (5, 3, 1, 0), (0, 4, 2, 2), (9, 6, 1, 0)]),
        (5, [(7, 0, 1, 3), (2, 1, 4, 0), (5, 5, 1, 0), (0, 6, 4, 0), (9, 10, 1, 0)]),
        (99, [(7, 0, 4, 0), (2, 4, 4, 0), (5, 8, 1, 0), (0, 9, 4, 0), (9, 13, 1, 0)]),
    ],
)
@pytest.mark.parametrize("lengths", [{}, {"seqlens_q": [2, 1], "seqlens_k": [9, 5]}])
def test_a_window_gathers_what_it_sees(window: int, records: list[tuple[int, ...]], lengths: dict[str, Any]) -> None:
    batch = build(TABLE, [0, 2, 3], [0, 9, 14], windows=[window], **lengths)
    piece = batch.windows[window]
    assert used(piece.plan) == records
    assert piece.plan.total_tokens == min(14, 3 + 2 * (window - 1))
    (attend,) = piece.attends
    tokens = sum(record[2] for record in records)
    assert attend.cu_seqlens_k.tolist()[-1] == tokens and attend.window == window and attend.causal
    assert attend.seqlens_k is None or list(attend.seqlens_k) == attend.cu_seqlens_k.diff().tolist()
    late = build(TABLE, [0, 2, 3], [0, 9, 14], **lengths)
    assert late.windows == {}
    assert used(late.for_window(window).plan) == records
    assert late.for_window(window) is late.windows[window], "planned once"


def test_a_window_gathers_nothing_for_a_sequence_with_nothing_new() -> None:
    batch = build(TABLE, [0, 0, 1], [0, 9, 14], windows=(2,))
    assert used(batch.windows[2].plan) == [(0, 0, 1, 3), (9, 1, 1, 0)]


def test_decode_needs_no_mask() -> None:
    batch = build(TABLE, [0, 1, 2], [0, 9, 14], windows=(3,), max_q=1)
    for piece in (batch.everything, batch.windows[3]):
        assert not piece.attends[0].causal and piece.attends[0].window is None


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, (3, 12)),  # what the totals and the table allow
        ({"total_q": 5, "total_k": 11}, (5, 11)),
        ({"max_q": 2, "max_k": 9}, (2, 9)),
        ({"max_q": 99, "max_k": 99}, (3, 12)),
        ({"max_k": 2}, (2, 2)),  # new tokens are among the tokens
        ({"seqlens_q": [2, 1], "seqlens_k": (9, 5)}, (2, 9)),
        ({"seqlens_q": [2, 1], "seqlens_k": (9, 5), "max_q": 7, "max_k": 12}, (2, 9)),
    ],
)
def test_bounds(given: dict[str, Any], bounds: tuple[int, int]) -> None:
    batch = build(TABLE, [0, 2, 3], [0, 9, 14], **{"total_k": 14, **given})
    assert (batch.max_q, batch.max_k) == bounds


def test_no_sequences_no_tokens_no_columns() -> None:
    empty = build([], [0], [0], windows=(3,))
    assert empty.slots.tolist() == [] and used(empty.plan) == [] and empty.num_sequences == 0
    spare = build([], [0], [0], total_q=4, total_k=5, windows=(3,))
    assert spare.slots.tolist() == [-1] * 4 and used(spare.plan) == []
    nothing = build([[], []], [0, 0, 0], [0, 0, 0], windows=(3,))
    assert nothing.slots.tolist() == [] and used(nothing.plan) == []
    for batch in (empty, spare, nothing):
        batch.check()


def test_a_batch_keeps_nothing_of_its_inputs() -> None:
    tensors = [torch.tensor(numbers) for numbers in (TABLE, [0, 2, 3], [0, 9, 14])]
    batch = PrefixBatch.build(*tensors, page_size=PAGE, num_blocks=BLOCKS)
    before = (used(batch.plan), batch.slots.tolist(), batch.block_table.tolist(), batch.cu_seqlens_q.tolist())
    for tensor in tensors:
        tensor.fill_(-1)
    assert (used(batch.plan), batch.slots.tolist(), batch.block_table.tolist(), batch.cu_seqlens_q.tolist()) == before
    batch.for_window(3)
    batch.check()


def test_views_with_strides() -> None:
    wide = torch.tensor(TABLE).repeat_interleave(2, 1)[:, ::2]
    q, k = (torch.tensor(offsets).repeat_interleave(3)[::3] for offsets in ([0, 2, 3], [0, 9, 14]))
    batch = PrefixBatch.build(wide, q, k, page_size=PAGE, num_blocks=BLOCKS)
    assert batch.slots.tolist() == build(TABLE, [0, 2, 3], [0, 9, 14]).slots.tolist()


NAN = -1  # in a checked table
BAD_CONTENTS: dict[str, tuple[Any, list[int], list[int], dict[str, Any], list[int], list[list[int]], str]] = {
    "an id below 0": (
        [[7, -1, 5], [0, 9, 3]], [0, 1, 2], [0, 9, 14], {}, [20, 36], [[7, NAN, 5], [0, 9, NAN]],
        r"block_table\[0, 1\] \(sequence 0, column 1\) is -1; accepted: block ids 0 to 9",
    ),
    "an id past the pool, where a new token goes": (
        [[7, 2, 5], [0, BLOCKS, 3]], [0, 1, 2], [0, 9, 14], {}, [20, -1], [[7, 2, 5], [0, NAN, NAN]],
        r"block_table\[1, 1\] \(sequence 1, column 1\) is 10; accepted",
    ),
    "a huge id": (
        [[INT64_MAX, 2, 5], [2**32, 9, 3]], [0, 1, 2], [0, 9, 14], {}, [20, 36], [[NAN, 2, 5], [NAN, 9, NAN]],
        r"\(sequence 0, column 0\) is 9223372036854775807",
    ),
    "more tokens than the table has": (
        TABLE, [0, 1, 2], [0, 13, 18], {}, [-1, 36], [[NAN] * 3, [0, 9, NAN]],
        r"block_table\[0, 3\] \(sequence 0, column 3\) is past the table's end",
    ),
    "more tokens than max_k": (
        TABLE, [0, 1, 2], [0, 9, 14], {"max_k": 8}, [-1, 36], [[NAN, NAN, NAN], [0, 9, NAN]],
        r"sequence 0 has 9 tokens; accepted: at most max_k, 8",
    ),
    "more new tokens than max_q": (
        TABLE, [0, 2, 3], [0, 9, 14], {"max_q": 1}, [-1, -1, 36], [[NAN] * 3, [0, 9, NAN]],
        r"sequence 0 has 2 tokens; accepted: at most max_q, 1",
    ),
    "more new tokens than tokens": (
        TABLE, [0, 3, 4], [0, 1, 6], {}, [-1, -1, 28, 36], [[7, NAN, NAN], [0, 9, NAN]],
        r"sequence 0 has 3 new tokens among 1; accepted",
    ),
    "falling new tokens": (
        TABLE, [0, 3, 2], [0, 9, 14], {"total_q": 3}, [10, 11, 20], [[7, 2, 5], [0, 9, NAN]],
        r"cu_seqlens_q\[2\] is 2, after 3 \(sequence 1\); accepted: offsets that begin at 0",
    ),
    "falling tokens": (
        TABLE, [0, 1, 2], [0, 9, 4], {"total_k": 9}, [20, -1], [[7, 2, 5], [NAN, NAN, NAN]],
        r"cu_seqlens_k\[2\] is 4, after 9 \(sequence 1\)",
    ),
    "new tokens past total_q": (
        TABLE, [0, 1, 9], [0, 9, 18], {"total_q": 3}, [20, 39, 12], [[7, 2, 5], [0, 9, 3]],
        r"cu_seqlens_q\[2\] is 9, after 1 .*end at or below total_q, 3",
    ),
    "tokens past total_k": (
        TABLE, [0, 1, 2], [0, 9, 14], {"total_k": 10}, [20, 0], [[7, 2, 5], [0, NAN, NAN]],
        r"cu_seqlens_k\[2\] is 14, after 9 .*total_k, 10",
    ),
    "a first offset above 0": (
        TABLE, [1, 2, 3], [0, 9, 14], {}, [11, 20, 36], [[7, 2, 5], [0, 9, NAN]], r"cu_seqlens_q\[0\] is 1; accepted: 0"
    ),
    "a first offset below 0": (
        TABLE, [0, 1, 2], [-2, 9, 14], {}, [20, 36], [[7, 2, 5], [0, 9, NAN]], r"cu_seqlens_k\[0\] is -2; accepted: 0"
    ),
    "a huge offset": (
        TABLE, [0, 1, INT64_MAX], [0, 9, INT64_MAX], {"total_q": 2, "total_k": 14}, [20, 36],
        [[7, 2, 5], [0, 9, NAN]], r"cu_seqlens_q\[2\] is 9223372036854775807",
    ),
    "other lengths than the host was given": (
        TABLE, [0, 1, 2], [0, 9, 14], {"seqlens_q": [1, 1], "seqlens_k": [9, 7], "total_k": 16}, [20, 36],
        [[7, 2, 5], [0, 9, NAN]], r"seqlens_k\[1\] is 7, and cu_seqlens_k says 5; accepted: the same",
    ),
    "no columns": (
        [[], []], [0, 1, 1], [0, 2, 2], {"total_k": 2}, [-1], [[NAN], [NAN]], r"sequence 0, column 0\) is past the"
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CONTENTS)
def test_bad_contents_reach_no_block_and_check_says_where(bad: str) -> None:
    table, q, k, more, slots, checked, message = BAD_CONTENTS[bad]
    batch = build(table, q, k, windows=(2,), **more)
    assert batch.slots.tolist() == slots
    assert batch.block_table.tolist() == checked
    assert int(batch.lens_k.max()) <= batch.block_table.shape[1] * PAGE
    for plan in (batch.plan, batch.windows[2].plan):
        assert bool((plan.records[:, 0] < BLOCKS).all())
        assert all(0 <= first and first + rows <= plan.total_tokens for _, first, rows, _ in used(plan))
    with pytest.raises(PlanError, match=message):
        batch.check()


def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD: dict[str, Any] = {
    "block_table": table(2, 3), "cu_seqlens_q": table(3), "cu_seqlens_k": table(3), "page_size": PAGE,
    "num_blocks": BLOCKS, "total_q": 4, "total_k": 24,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"block_table": [[0]]}, TypeError, r"block_table is list \[\[0\]\]; accepted: a torch.Tensor"),
        ({"block_table": table(6)}, ValueError, r"block_table has shape \[6\]; accepted: 2 dimensions"),
        ({"block_table": table(2, 3).float()}, TypeError, r"block_table has dtype float32; accepted: int32, int64"),
        ({"cu_seqlens_q": table(2)}, ValueError, r"cu_seqlens_q has shape \[2\]; accepted for 2 sequences: \[3\]"),
        ({"cu_seqlens_k": table(4)}, ValueError, r"cu_seqlens_k has shape \[4\]; accepted for 2 sequences: \[3\]"),
        ({"cu_seqlens_q": table(3).double()}, TypeError, r"cu_seqlens_q has dtype float64; accepted"),
        ({"cu_seqlens_k": table(3).to("meta")}, ValueError, r"cu_seqlens_k is on meta; accepted: cpu"),
        ({"page_size": 0}, ValueError, r"page_size is 0; accepted: 1 to"),
        ({"num_blocks": 2**31}, ValueError, r"num_blocks is 2147483648; accepted: 0 to"),
        ({"total_q": -1}, ValueError, r"total_q is -1; accepted: 0 to"),
        ({"total_k": 8.0}, TypeError, r"total_k is float 8.0; accepted: an int"),
        ({"max_q": True}, TypeError, r"max_q is bool True; accepted: an int"),
        ({"max_k": -2}, ValueError, r"max_k is -2; accepted: 0 to"),
        ({"windows": (128, 0)}, ValueError, r"windows\[1\] is 0; accepted: 1 to"),
        ({"windows": ("128",)}, TypeError, r"windows\[0\] is str '128'; accepted: an int"),
        ({"windows": 128}, TypeError, r"windows is int 128; accepted: ints, such as \(128,\)"),
        ({"seqlens_q": table(2)}, TypeError, r"seqlens_q is Tensor of shape \[2\]; accepted: None, or a list of ints"),
        ({"seqlens_q": [1]}, ValueError, r"seqlens_q has 1 lengths; accepted for 2 sequences: 2"),
        ({"seqlens_k": [1, -1]}, ValueError, r"seqlens_k\[1\] is -1; accepted: 0 to"),
        ({"seqlens_k": [13, 1]}, ValueError, r"seqlens_k\[0\] is 13; accepted: at most 12, the positions of a row"),
        ({"seqlens_q": [3, 2]}, ValueError, r"total_q is 4; accepted for seqlens_q of sum 5: 5 or more"),
        (
            {"seqlens_q": [1, 2], "seqlens_k": [5, 1]}, ValueError,
            r"seqlens_q\[1\] is 2, and seqlens_k\[1\] 1; accepted: seqlens_k counts cached \+ new",
        ),
        (
            {"seqlens_q": [1, 3], "max_q": 2}, ValueError,
            r"max_q is 2; accepted: at least 3, the longest of the lengths",
        ),
        (
            {"total_k": None, "cu_seqlens_k": torch.tensor([0, 0, 2**40])}, ValueError,
            r"cu_seqlens_k\[-1\] is 1099511627776; accepted: 0 to",
        ),
        ({"total_q": None, "cu_seqlens_q": table(3) - 1}, ValueError, r"cu_seqlens_q\[-1\] is -1; accepted"),
    ],
)  # fmt: skip
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    PrefixBatch.build(**GOOD)
    with pytest.raises(error, match=message):
        PrefixBatch.build(**{**GOOD, **wrong})


@pytest.mark.gpu
def test_the_gpu_makes_the_same_batch() -> None:
    for tables, q, k, more, _, _, message in BAD_CONTENTS.values():
        there, here = (build(tables, q, k, device, windows=(2,), **more) for device in ("cuda", "cpu"))
        assert there.slots.tolist() == here.slots.tolist()
        assert there.block_table.tolist() == here.block_table.tolist()
        for ours, theirs in ((there.plan, here.plan), (there.windows[2].plan, here.windows[2].plan)):
            assert ours.records.tolist() == theirs.records.tolist()
        with pytest.raises(PlanError, match=message):
            there.check()


@pytest.mark.gpu
@pytest.mark.parametrize("given", [{"total_q": 3, "total_k": 14}, {"seqlens_q": [2, 1], "seqlens_k": [9, 5]}])
def test_nothing_waits_for_the_gpu(given: dict[str, Any]) -> None:
    tensors = [torch.tensor(numbers, device="cuda") for numbers in (TABLE, [0, 2, 3], [0, 9, 14])]
    for _ in range(2):
        with nothing_waits():
            batch = PrefixBatch.build(*tensors, page_size=PAGE, num_blocks=BLOCKS, windows=(3,), **given)
            batch.for_window(2)
    assert batch.slots.tolist() == [11, 20, 36]
