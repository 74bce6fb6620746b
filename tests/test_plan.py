"""The plan: records worked out on paper with pages of 4 tokens, and everything that can be wrong with its inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgather as kg
from kvgather.plan import GatherPlan, PlanError
from tests.gather.oracle import assert_same, first_difference, untouched
from tests.where import nothing_waits, on_each_device

PAGE, BLOCKS = 4, 10
TABLE = [[7, 2, 5], [0, 9, 3]]
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


def build(
    table: list[list[int]],
    offsets: list[int],
    starts: list[int] | None = None,
    total: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.int32,
) -> GatherPlan:
    def tensor(numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)

    rows = tensor(table) if table else torch.empty((0, 3), dtype=dtype, device=device)
    return GatherPlan.build(
        rows,
        tensor(offsets),
        page_size=PAGE,
        num_blocks=BLOCKS,
        total_tokens=total,
        seq_starts=None if starts is None else tensor(starts),
    )


def used(plan: GatherPlan) -> list[tuple[int, ...]]:
    """The records that name rows: (block, first row, rows, offset of the first row in its page)."""
    return [tuple(record) for record in plan.records.tolist() if record[2]]


@pytest.mark.parametrize(
    ("offsets", "starts", "records"),
    [
        ([0, 4, 4], None, [(7, 0, 4, 0)]),
        ([0, 5, 8], None, [(7, 0, 4, 0), (2, 4, 1, 0), (0, 5, 3, 0)]),
        ([0, 12, 24], None, [(7, 0, 4, 0), (2, 4, 4, 0), (5, 8, 4, 0), (0, 12, 4, 0), (9, 16, 4, 0), (3, 20, 4, 0)]),
        ([0, 0, 0], None, []),
        ([0, 0, 3], [0, 0], [(0, 0, 3, 0)]),
        ([0, 1, 1], [3, 0], [(7, 0, 1, 3)]),  # the last slot of a page
        ([0, 2, 2], [3, 0], [(7, 0, 1, 3), (2, 1, 1, 0)]),  # across the edge
        ([0, 6, 8], [3, 5], [(7, 0, 1, 3), (2, 1, 4, 0), (5, 5, 1, 0), (9, 6, 2, 1)]),
        ([0, 4, 8], [8, 4], [(5, 0, 4, 0), (9, 4, 4, 0)]),  # later pages only
        ([0, 3, 3], [0, 999], [(7, 0, 3, 0)]),  # an empty sequence may begin anywhere
    ],
)
def test_records_by_hand(offsets: list[int], starts: list[int] | None, records: list[tuple[int, ...]]) -> None:
    for dtype in (torch.int32, torch.int64):
        for total in (None, offsets[-1], offsets[-1] + 9):
            plan = build(TABLE, offsets, starts, total, dtype=dtype)
            assert used(plan) == records
            assert plan.total_tokens == (offsets[-1] if total is None else total)
            assert plan.records.dtype == torch.int32 and plan.records.is_contiguous()
            plan.check()


def test_capacity_depends_on_sizes_alone() -> None:
    lengths = [build(TABLE, offsets, total=10).records.shape for offsets in ([0, 0, 0], [0, 3, 10], [0, 9, 10])]
    assert lengths == [(-(-10 // PAGE) + 2 * 2, 4)] * 3


@pytest.mark.parametrize("length", range(1, 10))
def test_the_worst_starts_fit_into_the_capacity(length: int) -> None:
    batch = 5
    table = [[(b + c) % BLOCKS for c in range(5)] for b in range(batch)]
    plan = build(table, [length * b for b in range(batch + 1)], [3] * batch)
    assert sum(record[2] for record in used(plan)) == length * batch


def test_no_sequences_and_no_tokens() -> None:
    for plan in (build([], [0]), build([], [0], [], 7), build(TABLE, [0, 0, 0]), build([[], []], [0, 0, 0])):
        assert used(plan) == []
        plan.check()
    assert build([], [0]).records.shape == (0, 4)
    assert build([], [0], [], 7).total_tokens == 7


def test_a_table_that_is_not_contiguous() -> None:
    wide = torch.tensor(TABLE, dtype=torch.int32).repeat_interleave(2, 1)
    offsets = torch.tensor([0, 99, 6, 99, 11, 99], dtype=torch.int64)[::2]
    plan = GatherPlan.build(wide[:, ::2], offsets, page_size=PAGE, num_blocks=BLOCKS)
    assert used(plan) == used(build(TABLE, [0, 6, 11]))
    plan = GatherPlan.build(wide.t()[::2].t(), offsets, page_size=PAGE, num_blocks=BLOCKS, total_tokens=11)
    assert used(plan) == used(build(TABLE, [0, 6, 11]))


def test_the_tail_of_a_table_may_hold_anything() -> None:
    plan = build([[7, -5, INT32_MAX], [-1, -1, -1]], [0, 4, 4])
    assert used(plan) == [(7, 0, 4, 0)]
    plan.check()
    plan = build([[-3, INT64_MAX, 5], [0, -(2**63), 3]], [0, 2, 3], [8, 0], dtype=torch.int64)
    assert used(plan) == [(5, 0, 2, 0), (0, 2, 1, 0)]
    plan.check()


def test_a_start_whose_last_column_no_int64_holds_is_past_the_table() -> None:
    plan = GatherPlan.build(
        torch.tensor([[7, 2]]),
        torch.tensor([0, 3]),
        page_size=1,
        num_blocks=BLOCKS,
        seq_starts=torch.tensor([INT64_MAX - 1]),
    )
    assert used(plan) == [(-1, 0, 1, 0), (-1, 1, 1, 0), (-1, 2, 1, 0)]
    with pytest.raises(PlanError, match=r"sequence 0, column"):
        plan.check()


def test_a_plan_keeps_nothing_of_its_inputs() -> None:
    table = torch.tensor(TABLE)
    offsets = torch.tensor([0, 5, 8])
    starts = torch.tensor([1, 2])
    plan = GatherPlan.build(table, offsets, page_size=PAGE, num_blocks=BLOCKS, seq_starts=starts)
    before = used(plan)
    for tensor in (table, offsets, starts):
        tensor.fill_(-1)
    assert used(plan) == before
    plan.check()


BAD_CONTENTS: dict[str, tuple[Any, list[int], Any, int | None, list[tuple[int, ...]], str]] = {
    "an id below 0": (
        [[7, -1, 5], [0, 9, 3]], [0, 6, 7], None, None, [(7, 0, 4, 0), (-1, 4, 2, 0), (0, 6, 1, 0)],
        r"block_table\[0, 1\] \(sequence 0, column 1\) is -1.*accepted: block ids 0 to 9",
    ),
    "an id past the pool": (
        [[7, 2, 5], [0, 9, BLOCKS]], [0, 0, 2], [0, 9], None, [(-1, 0, 2, 1)],
        r"block_table\[1, 2\] \(sequence 1, column 2\) is 10",
    ),
    "a huge id": (
        [[INT64_MAX, 2, 5], [2**32, 9, 3]], [0, 1, 2], None, None, [(-1, 0, 1, 0), (-1, 1, 1, 0)],
        r"\(sequence 0, column 0\) is 9223372036854775807",
    ),
    "a length past the table": (
        TABLE, [0, 14, 15], None, None, [(7, 0, 4, 0), (2, 4, 4, 0), (5, 8, 4, 0), (-1, 12, 2, 0), (0, 14, 1, 0)],
        r"block_table\[0, 3\] \(sequence 0, column 3\) .*past the table's end",
    ),
    "a start past the table": (TABLE, [0, 1, 2], [12, 0], None, [(-1, 0, 1, 0), (0, 1, 1, 0)], r"sequence 0, column 3"),
    "a start past all tables": (TABLE, [0, 0, 2], [0, INT64_MAX], None, [(-1, 0, 1, 3), (-1, 1, 1, 0)], r"sequence 1"),
    "a negative start": (
        TABLE, [0, 6, 7], [-1, 0], None, [(-1, 0, 4, 0), (-1, 4, 2, 0), (0, 6, 1, 0)],
        r"block_table\[0, -1\] \(sequence 0, column -1\) is before the sequence: seq_starts\[0\] is negative",
    ),
    "the smallest start": (TABLE, [0, 1, 2], [-(2**63), 0], None, [(-1, 0, 1, 0), (0, 1, 1, 0)], r"seq_starts\[0\]"),
    "a falling offset": (
        TABLE, [0, 5, 3], None, 5, [(7, 0, 4, 0), (2, 4, 1, 0)], r"cu_seqlens_k\[2\] is 3, after 5; accepted: offsets"
    ),
    "a negative offset": (TABLE, [0, -4, 3], None, None, [(0, 0, 3, 0)], r"cu_seqlens_k\[1\] is -4, after 0; accepted"),
    "past total_tokens": (
        TABLE, [0, 5, 12], None, 6, [(7, 0, 4, 0), (2, 4, 1, 0), (0, 5, 1, 0)],
        r"cu_seqlens_k\[2\] is 12, after 5; accepted: .*at or below total_tokens, 6",
    ),
    "a huge offset": (
        TABLE, [0, INT64_MAX, INT64_MAX], None, 3, [(7, 0, 3, 0)], r"cu_seqlens_k\[1\] is 9223372036854775807"
    ),
    "a first offset above 0": (TABLE, [2, 5, 6], None, None, [(7, 2, 3, 0), (0, 5, 1, 0)], r"k\[0\] is 2; acc"),
    "a first offset below 0": (TABLE, [-2, 1, 2], None, None, [(7, 0, 1, 0), (0, 1, 1, 0)], r"k\[0\] is -2; acc"),
    "no columns": ([[], []], [0, 1, 1], None, None, [(-1, 0, 1, 0)], r"block_table\[0, 0\] \(sequence 0, column 0\)"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CONTENTS)
def test_bad_contents_become_records_without_a_block_and_check_says_where(bad: str) -> None:
    table, offsets, starts, total, records, message = BAD_CONTENTS[bad]
    plan = build(table, offsets, starts, total, dtype=torch.int64)
    assert used(plan) == records
    with pytest.raises(PlanError, match=message):
        plan.check()


@on_each_device
@pytest.mark.parametrize("bad", BAD_CONTENTS)
def test_rows_of_a_bad_entry_are_nan_and_nothing_else_changes(bad: str, where: str) -> None:
    table, offsets, starts, total, records, _ = BAD_CONTENTS[bad]
    plan = build(table, offsets, starts, total, where, torch.int64)
    pool = torch.rand(BLOCKS, PAGE, 2, 8, device=where) + 1
    wanted = untouched((plan.total_tokens + 3, 2, 8), torch.float32, where)
    for block, first, rows, begin in records:
        wanted[first : first + rows] = torch.nan if block < 0 else pool[block, begin : begin + rows] * 0.5
    for backend in ("triton", "torch"):
        out = (torch.empty_like(wanted), torch.empty_like(wanted))
        for rows_of in out:
            rows_of.copy_(untouched(tuple(wanted.shape), torch.float32, where))
        kg.gather(pool, pool, plan, k_scale=0.5, v_scale=0.5, out_dtype=torch.float32, out=out, backend=backend)
        assert_same(out, (wanted, wanted))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float16])
@on_each_device
def test_bare_bits_of_a_bad_entry_are_nan_too(dtype: torch.dtype, where: str) -> None:
    plan = build([[7, -1, 5], [0, 9, 3]], [0, 6, 7], device=where)
    pool = torch.ones(BLOCKS, PAGE, 1, 16, device=where).to(dtype)
    for backend in ("triton", "torch"):
        for rows in kg.gather(pool, pool, plan, out_dtype=dtype, backend=backend):
            nan = rows.float().isnan().all(-1).flatten()
            assert nan.tolist() == [False] * 4 + [True] * 2 + [False]


@on_each_device
def test_a_pool_of_no_blocks_has_no_good_id(where: str) -> None:
    table = torch.zeros((1, 2), dtype=torch.int32, device=where)
    offsets = torch.tensor([0, 5], device=where)
    plan = GatherPlan.build(table, offsets, page_size=PAGE, num_blocks=0, total_tokens=6)
    with pytest.raises(PlanError, match=r"sequence 0, column 0"):
        plan.check()
    pool = torch.empty(0, PAGE, 2, 8, device=where)
    for backend in ("triton", "torch"):
        out = tuple(torch.zeros(6, 2, 8, device=where) for _ in "kv")
        for rows in kg.gather(pool, pool, plan, out=out, out_dtype=torch.float32, backend=backend):
            assert rows.isnan().all(-1).all(-1).tolist() == [True] * 5 + [False]


def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def short(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


GOOD: dict[str, Any] = {
    "block_table": table(2, 3), "cu_seqlens_k": table(3), "page_size": PAGE, "num_blocks": BLOCKS, "total_tokens": 8,
    "seq_starts": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"block_table": [[0]]}, TypeError, r"block_table is list \[\[0\]\]; accepted: a torch.Tensor"),
        ({"block_table": table(6)}, ValueError, r"block_table has shape \[6\]; accepted: 2 dimensions"),
        ({"block_table": table(2, 3).float()}, TypeError, r"block_table has dtype float32; accepted: int32, int64"),
        ({"block_table": table(2, 3).short()}, TypeError, r"block_table has dtype int16; accepted: int32, int64"),
        ({"block_table": short(table(2, 3))}, ValueError, r"block_table .*reaches byte 24 of its memory, which has 23"),
        ({"block_table": table(2, 3).to_sparse()}, ValueError, r"block_table has layout torch.sparse_coo; accepted"),
        ({"cu_seqlens_k": None}, TypeError, r"cu_seqlens_k is NoneType None; accepted: a torch.Tensor"),
        ({"cu_seqlens_k": table(2)}, ValueError, r"cu_seqlens_k has shape \[2\]; accepted for 2 sequences: \[3\]"),
        ({"cu_seqlens_k": table(3, 1)}, ValueError, r"cu_seqlens_k has shape \[3, 1\]; accepted: 1 dimensions"),
        ({"cu_seqlens_k": table(3).double()}, TypeError, r"cu_seqlens_k has dtype float64; accepted"),
        ({"cu_seqlens_k": table(3).to("meta")}, ValueError, r"cu_seqlens_k is on meta; accepted: cpu"),
        ({"seq_starts": table(3)}, ValueError, r"seq_starts has shape \[3\]; accepted for 2 sequences: \[2\]"),
        ({"seq_starts": [0, 0]}, TypeError, r"seq_starts is list"),
        ({"seq_starts": table(2).to("meta")}, ValueError, r"seq_starts is on meta; accepted: cpu"),
        ({"page_size": 0}, ValueError, r"page_size is 0; accepted: 1 to"),
        ({"page_size": 16.0}, TypeError, r"page_size is float 16.0; accepted: an int"),
        ({"num_blocks": -1}, ValueError, r"num_blocks is -1; accepted: 0 to"),
        ({"num_blocks": 2**31}, ValueError, r"num_blocks is 2147483648; accepted: 0 to 2147483647"),
        ({"total_tokens": -1}, ValueError, r"total_tokens is -1; accepted: 0 to"),
        ({"total_tokens": True}, TypeError, r"total_tokens is bool True; accepted: an int"),
        ({"total_tokens": torch.tensor(3)}, TypeError, r"total_tokens is Tensor .*; accepted: an int"),
        (
            {"total_tokens": None, "cu_seqlens_k": torch.tensor([0, 0, 2**40])}, ValueError,
            r"cu_seqlens_k\[-1\] is 1099511627776; accepted for a block table of 24 positions",
        ),
        (
            {"total_tokens": None, "cu_seqlens_k": torch.tensor([0, 0, -1])}, ValueError,
            r"cu_seqlens_k\[-1\] is -1; accepted",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    GatherPlan.build(**GOOD)
    with pytest.raises(error, match=message):
        GatherPlan.build(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("pool", "plan", "message"),
    [
        ((BLOCKS, 8, 2, 8), {}, r"plan was made for page_size 4; accepted: the cache's, 8"),
        ((BLOCKS - 1, PAGE, 2, 8), {}, r"plan was made for a pool of 10 blocks; accepted: at most the cache's 9"),
    ],
)
def test_a_plan_for_another_cache_is_refused(pool: tuple[int, ...], plan: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kg.gather(torch.empty(pool), torch.empty(pool), build(TABLE, [0, 4, 8]))


def test_a_plan_for_a_smaller_pool_is_fine() -> None:
    pool = torch.rand(BLOCKS + 5, PAGE, 1, 8)
    k, _ = kg.gather(pool, pool, build(TABLE, [0, 4, 8]), out_dtype=torch.float32)
    assert torch.equal(k, torch.cat((pool[7], pool[0])))


def test_a_plan_on_another_device_is_refused() -> None:
    cache = kg.PagedKVCache(BLOCKS, PAGE, 2, 8, device="cpu")
    assert cache.likeness >= 0  # compared with its geometry here, and not again
    cache.geometry = replace(cache.geometry, device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"plan is on cpu; accepted: the cache's device, meta"):
        cache.gather(build(TABLE, [0, 4, 8]))
    pool = torch.empty(BLOCKS, PAGE, 2, 8, device="meta")
    with pytest.raises(ValueError, match=r"key_cache is on meta, which holds no values; accepted: a tensor on a GPU"):
        kg.gather(pool, pool, build(TABLE, [0, 4, 8]))


@pytest.mark.gpu
def test_the_gpu_makes_the_same_records() -> None:
    for tables, offsets, starts, total, _, message in BAD_CONTENTS.values():
        plan = build(tables, offsets, starts, total, "cuda", torch.int64)
        assert plan.records.tolist() == build(tables, offsets, starts, total, "cpu", torch.int64).records.tolist()
        with pytest.raises(PlanError, match=message):
            plan.check()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_when_total_tokens_is_given() -> None:
    arguments = [torch.tensor(n, dtype=torch.int32, device="cuda") for n in (TABLE, [0, 6, 8], [3, 5])]
    pool = torch.rand(BLOCKS, PAGE, 2, 8, device="cuda")
    kwargs: dict[str, int] = {"page_size": PAGE, "num_blocks": BLOCKS, "total_tokens": 8}
    for _ in range(2):  # the first time compiles
        with nothing_waits():
            plan = GatherPlan.build(arguments[0], arguments[1], seq_starts=arguments[2], **kwargs)
            kg.gather(pool, pool, plan, k_scale=None, out_dtype=torch.float32)
    assert used(plan) == [(7, 0, 1, 3), (2, 1, 4, 0), (5, 5, 1, 0), (9, 6, 2, 1)]


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_graph_replays_with_other_tables_and_lengths(dtype: torch.dtype) -> None:
    table = torch.tensor(TABLE, dtype=dtype, device="cuda")
    offsets = torch.tensor([0, 6, 8], dtype=dtype, device="cuda")
    starts = torch.tensor([3, 5], dtype=dtype, device="cuda")
    pool = torch.rand(BLOCKS, PAGE, 2, 8, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.tensor([0.5], device="cuda")
    out = tuple(untouched((20, 2, 8), torch.bfloat16, "cuda") for _ in range(2))

    def step() -> GatherPlan:
        plan = GatherPlan.build(table, offsets, page_size=PAGE, num_blocks=BLOCKS, total_tokens=20, seq_starts=starts)
        kg.gather(pool, pool, plan, k_scale=scale, v_scale=scale, out=out)
        return plan

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = step()
    for tables, cu, begin in (
        (TABLE, [0, 6, 8], [3, 5]),
        ([[1, 1, 1], [4, 5, 6]], [0, 0, 12], [0, 0]),
        ([[9, 8, 7], [6, -1, 4]], [0, 11, 20], [1, 0]),
        (TABLE, [0, 0, 0], [0, 0]),
    ):
        for buffer, contents in ((table, tables), (offsets, cu), (starts, begin)):
            buffer.copy_(torch.tensor(contents, dtype=dtype))
        for rows in out:
            rows.copy_(untouched((20, 2, 8), torch.bfloat16, "cuda"))
        graph.replay()
        eager = build(tables, cu, begin, 20, "cuda", dtype)
        assert plan.records.tolist() == eager.records.tolist()
        wanted = untouched((20, 2, 8), torch.bfloat16, "cuda")
        kg.gather(pool, pool, eager, k_scale=scale, v_scale=scale, out=(wanted, wanted.clone()), backend="torch")
        assert not first_difference(out[0], wanted)
        if -1 in tables[1]:
            with pytest.raises(PlanError, match=r"sequence 1, column 1"):
                plan.check()
        else:
            plan.check()
