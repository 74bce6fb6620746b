"""Which page a program serves: every record of a batch against a plain loop over its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvgather.device import interpreting, triton_available
from tests.where import on_each_device

if triton_available():
    import triton
    import triton.language as tl

    from kvgather.kernels.launch import launching
    from kvgather.kernels.pages import PageSearch, find_page

    @triton.jit(do_not_specialize=["batch", "columns", "num_blocks", "total"])
    def pages_kernel(
        table_ptr, cu_ptr, start_ptr, out_ptr, batch, columns, num_blocks, total, strides,
        PAGES: tl.constexpr,
    ):  # fmt: skip
        record = tl.program_id(0)
        block, first, rows, begin, sequence, column, block_id = find_page(
            record, (table_ptr, cu_ptr, start_ptr), (batch, columns, num_blocks, total), strides, PAGES
        )
        out_ptr += record.to(tl.int64) * 7
        tl.store(out_ptr, block)
        tl.store(out_ptr + 1, first)
        tl.store(out_ptr + 2, rows)
        tl.store(out_ptr + 3, begin)
        tl.store(out_ptr + 4, sequence)
        tl.store(out_ptr + 5, column)
        tl.store(out_ptr + 6, block_id)


@dataclass
class Batch:
    """A table `[batch, columns]`, offsets `[batch + 1]`, positions at which sequences begin, and the pool's sizes."""

    table: list[list[int]]
    cu: list[int]
    starts: list[int] | None
    page: int
    num_blocks: int
    total: int
    dtype: torch.dtype = torch.int32

    @property
    def records(self) -> int:
        return -(-self.total // self.page) + 2 * len(self.table)


def obvious(batch: Batch) -> dict[int, tuple[int, ...]]:
    """(block, first row, rows, page offset, sequence, column, id) of each record that names rows."""
    found: dict[int, tuple[int, ...]] = {}
    offsets = [min(max(offset, 0), batch.total) for offset in batch.cu]
    end = offsets[0]
    for sequence, row in enumerate(batch.table):
        begin, end = end, max(end, offsets[sequence + 1])
        start = 0 if batch.starts is None else batch.starts[sequence]
        for token in range(end - begin):
            page, slot = divmod(max(start, 0) + token, batch.page)
            record = begin // batch.page + 2 * sequence + page - max(start, 0) // batch.page
            if record in found:
                block, first, rows, *rest = found[record]
                found[record] = (block, first, rows + 1, *rest)
                continue
            column = -1 if start < 0 else page
            block_id = row[column] if 0 <= column < len(row) else -1
            block = block_id if 0 <= block_id < batch.num_blocks else -1
            found[record] = (block, begin + token, 1, slot, sequence, column, block_id)
    return found


def found_by_kernel(batch: Batch, lanes: int, where: str) -> dict[int, tuple[int, ...]]:
    table = torch.tensor(batch.table, dtype=batch.dtype, device=where).reshape(len(batch.table), -1)
    cu = torch.tensor(batch.cu, dtype=batch.dtype, device=where)
    starts = cu if batch.starts is None else torch.tensor(batch.starts, dtype=batch.dtype, device=where)
    out = torch.full((batch.records, 7), -99, dtype=torch.int64, device=where)
    with launching(table, interpreting()):
        pages_kernel[(batch.records,)](
            table, cu, starts, out, len(batch.table), table.shape[1], batch.num_blocks, batch.total,
            (*table.stride(), 1, 1), PAGES=PageSearch(batch.page, batch.starts is not None, lanes),
        )  # fmt: skip
    rows = out.tolist()
    assert all(row[2] >= 0 for row in rows)
    return {record: tuple(row) for record, row in enumerate(rows) if row[2]}


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    batch, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    page, dtype = draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([torch.int32, torch.int64]))
    least, most = (-(2**31), 2**31 - 1) if dtype == torch.int32 else (-(2**63), 2**63 - 1)
    anything = st.integers(-2, 20) | st.sampled_from([least, most])
    lengths = draw(st.lists(st.integers(0, 7), min_size=batch, max_size=batch))
    cu = [sum(lengths[:i]) for i in range(batch + 1)]
    if draw(st.booleans()):
        cu = draw(st.lists(anything, min_size=batch + 1, max_size=batch + 1))
    starts = draw(st.none() | st.lists(st.integers(-1, 9), min_size=batch, max_size=batch))
    ids = draw(st.lists(anything, min_size=batch * columns, max_size=batch * columns))
    table = [ids[i * columns : (i + 1) * columns] for i in range(batch)]
    return Batch(table, cu, starts, page, 9, draw(st.sampled_from([cu[-1] if 0 <= cu[-1] < 40 else 20, 9])), dtype)


@on_each_device
@settings(max_examples=25)
@given(batch=batches(), lanes=st.sampled_from([4, 32]))
def test_every_record_of_any_batch(batch: Batch, lanes: int, where: str) -> None:
    """32 lanes hold all offsets of such a batch at once; 4 take steps."""
    assert found_by_kernel(batch, lanes, where) == obvious(batch)


@on_each_device
@pytest.mark.parametrize(("sequences", "lanes"), [(31, 32), (33, 16), (40, 256)])
def test_as_many_sequences_as_lanes_and_more(sequences: int, lanes: int, where: str) -> None:
    lengths = [(0, 5, 1, 3)[i % 4] for i in range(sequences)]
    cu = [sum(lengths[:i]) for i in range(sequences + 1)]
    table = [[(2 * i) % 60, (2 * i + 1) % 60, 60 + i] for i in range(sequences)]
    batch = Batch(table, cu, [i % 3 for i in range(sequences)], 4, 60, cu[-1])
    assert found_by_kernel(batch, lanes, where) == obvious(batch)


@on_each_device
def test_by_hand(where: str) -> None:
    """Pages of 4. The first sequence has 6 tokens from position 3 on: the last slot of block 7, then blocks 2 and 5."""
    batch = Batch([[7, 2, 5], [0, 99, 3]], [0, 6, 8], [3, 4], page=4, num_blocks=10, total=8)
    assert batch.records == 6
    assert found_by_kernel(batch, 32, where) == {
        0: (7, 0, 1, 3, 0, 0, 7),
        1: (2, 1, 4, 0, 0, 1, 2),
        2: (5, 5, 1, 0, 0, 2, 5),
        3: (-1, 6, 2, 0, 1, 1, 99),  # 6 // 4 + 2: one page less than the first can have
    }
