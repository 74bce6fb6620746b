"""What kernels get of the block pool: slots, tables and offsets, worked out on paper with pages of 3 and 4 tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvgather.blocks import BlockPool, cu_seqlens
from tests.prompts import PROMPT


def test_slots_follow_the_block_table() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    pool.allocate([7])
    seq = pool.allocate(PROMPT)  # blocks 1, 2, 3
    assert pool.slots(seq).tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert pool.slots(seq, 3, 9).tolist() == [7, 8, 9, 10, 11, 12]
    assert pool.slots(seq, 8).tolist() == [12, 13]
    assert pool.slots(seq, 4, 4).tolist() == []
    assert pool.slots(seq, 10).dtype == torch.int64


def test_slots_of_scattered_blocks() -> None:
    pool = BlockPool(num_blocks=4, page_size=3)
    one, two = pool.allocate([1, 2, 3]), pool.allocate([4])
    pool.append(one, 9)
    assert one.block_ids == [0, 2]
    assert pool.slots(one).tolist() == [0, 1, 2, 6]
    assert pool.slots(two).tolist() == [3]


def test_block_table_pads_with_minus_one() -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seqs = [pool.allocate(PROMPT), pool.allocate([1])]
    table = pool.block_table(seqs)
    assert table.dtype == torch.int32
    assert table.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert pool.block_table([]).shape == (0, 0)


def test_cu_seqlens() -> None:
    sums = cu_seqlens([3, 0, 5])
    assert sums.dtype == torch.int32
    assert sums.tolist() == [0, 3, 3, 8]
    assert cu_seqlens([]).tolist() == [0]
    with pytest.raises(ValueError, match=r"lengths\[1\] is -2"):
        cu_seqlens([3, -2])
    with pytest.raises(ValueError, match="sum of lengths is 4294967294"):
        cu_seqlens([2**31 - 1, 2**31 - 1])


def test_lengths_of_torch_and_numpy() -> None:
    for lengths in (torch.tensor([3, 0, 5]), np.array([3, 0, 5]), iter([3, 0, np.int64(5)])):
        assert cu_seqlens(lengths).tolist() == [0, 3, 3, 8]


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_tables_do_not_follow_the_default_device(default: str) -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    seq = pool.allocate(PROMPT)
    with torch.device(default):
        assert pool.slots(seq, 3, 6).tolist() == [3, 4, 5]
        assert pool.block_table([seq]).tolist() == [[0, 1, 2]] and cu_seqlens([2]).tolist() == [0, 2]
