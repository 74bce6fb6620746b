"""The tensors of a batch in plain torch: worked out by hand, and by plain loops over each sequence and token."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from kvgather.batch.contents import Sizes
from kvgather.batch.reference import batch_tensors, window_lengths, window_offsets


def test_by_hand() -> None:
    """Of three sequences the first has too many tokens, the second falls, the third has more new tokens than tokens."""
    table = torch.tensor([[7, 2], [3, 4], [0, 99]])
    sizes = Sizes(page_size=4, num_blocks=10, total_q=6, total_k=20, max_q=3, most=8)
    made = batch_tensors(table, torch.tensor([0, 2, 1, 5]), torch.tensor([0, 9, 4, 11]), sizes)
    assert made.table.tolist() == [[-1, -1], [-1, -1], [0, -1]]
    assert made.cu_q.tolist() == [0, 2, 2, 5] and made.cu_k.tolist() == [0, 8, 8, 10]
    assert made.slots.tolist() == [-1, -1, -1, 0, 1, -1]
    assert [copy.tolist() for copy in made.given()] == [table.tolist(), [0, 2, 1, 5], [0, 9, 4, 11]]
    cu_k, starts = window_offsets(made.cu_q, made.cu_k, max_q=3, window=2, capacity=100)
    assert cu_k.tolist() == [0, 3, 3, 5] and starts.tolist() == [5, 0, 0]


@given(st.data())
def test_plain_loops_over_sequences_and_tokens(data: st.DataObject) -> None:
    """Contents that are right: each token's block and slot follow from the table."""
    page, columns, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), 9
    lengths_of = st.integers(0, columns * page).flatmap(lambda k: st.tuples(st.integers(0, min(k, 4)), st.just(k)))
    pairs = data.draw(st.lists(lengths_of, max_size=4))
    new, total = [q for q, _ in pairs], [k for _, k in pairs]
    ids = st.lists(st.integers(0, blocks - 1), min_size=columns, max_size=columns)
    table = [data.draw(ids) for _ in pairs]
    spare, window = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 6))
    sizes = Sizes(page, blocks, sum(new) + spare, sum(total), max(new, default=0), columns * page)
    cu_q, cu_k = (torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)]) for lens in (new, total))
    made = batch_tensors(torch.tensor(table, dtype=torch.int32).reshape(-1, columns), cu_q, cu_k, sizes, "torch")
    slots, checked, begins, lengths = [], [], [], []
    for row, q, k in zip(table, new, total, strict=True):
        checked.append([block if column * page < k else -1 for column, block in enumerate(row)])
        slots += [row[position // page] * page + position % page for position in range(k - q, k)]
        seen = {p for at in range(k - q, k) for p in range(max(0, at - window + 1), at + 1)}
        lengths.append(len(seen))
        begins.append(k - len(seen))
    assert made.table.tolist() == checked
    assert made.slots.tolist() == slots + [-1] * spare
    assert made.cu_q.tolist() == cu_q.tolist() and made.cu_k.tolist() == cu_k.tolist()
    assert window_lengths(made.cu_q.diff(), made.cu_k.diff(), sizes.max_q, window).tolist() == lengths
    offsets, starts = window_offsets(made.cu_q, made.cu_k, sizes.max_q, window, 10**6, "torch")
    assert offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)] and starts.tolist() == begins
