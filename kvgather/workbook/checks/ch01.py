"""Checks of chapter 01: slots, blocks, hits and evictions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgather.blocks import BlockPool
from kvgather.workbook.checks import exercise, expect


@exercise("01.1", correct="the block table gives the block, and the remainder gives the page offset")
def slot_of(answer: Callable[[int, list[int], int], int]) -> None:
    for block_ids, page_size in (([5, 2, 7], 4), ([1, 0, 2], 3), ([3, 9, 4, 1], 16)):
        slots = [block_id * page_size + page_offset for block_id in block_ids for page_offset in range(page_size)]
        for position, slot in enumerate(slots):
            got = answer(position, list(block_ids), page_size)
            expect(slot, got, f"position {position} of block table {block_ids}, page {page_size}")


@exercise("01.2", correct="the formula for one position, applied to a tensor of positions")
def chunk_slots(answer: Callable[[int, int, list[int], int], Tensor]) -> None:
    for start, end, block_ids, page_size in (
        (0, 10, [5, 2, 7], 4),
        (4, 8, [5, 2, 7], 4),
        (6, 11, [5, 2, 7], 4),
        (3, 3, [5, 2, 7], 4),
        (2, 7, [1, 0, 2], 3),
    ):
        slots = [block_id * page_size + page_offset for block_id in block_ids for page_offset in range(page_size)]
        expected = torch.tensor(slots[start:end], dtype=torch.int64)
        name = f"positions {start} to {end - 1} of block table {block_ids}, page {page_size}"
        expect(expected, answer(start, end, list(block_ids), page_size), name)


@exercise("01.3", correct="whole blocks from the beginning, and at least one token left to compute")
def hit_blocks(answer: Callable[[list[int], dict[tuple[int, ...], int], int], list[int]]) -> None:
    stored = {3: (1, 2, 3, 4), 7: (1, 2, 3, 4, 5, 6, 7, 8), 0: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)}
    published = {prefix: block_id for block_id, prefix in stored.items()}
    orphaned = {prefix: block_id for block_id, prefix in stored.items() if block_id != 7}
    for tokens, expected, known, story in (
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], [3, 7], published, "two blocks are known, the next token differs"),
        ([9, 9, 9, 9, 9], [], published, "nothing is known"),
        ([1, 2, 3], [], published, "less than a block"),
        ([1, 2, 3, 4, 5, 6, 7, 8], [3], published, "the second block would cover the last token"),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 7], published, "one token is left after two blocks"),
        ([5, 6, 7, 8, 1], [], published, "known tokens after a different prefix"),
        (list(range(1, 14)), [3], orphaned, "the second block was evicted, the third was not"),
        (list(range(1, 14)), [3, 7, 0], published, "three blocks are known, and the third is block 0"),
    ):
        expect(expected, answer(list(tokens), dict(known), 4), f"tokens {tokens} ({story})")


@exercise("01.4", correct="least recently used first; Z used the beginning of X again; a chain is evicted from its end")
def evicted(answer: list[int]) -> None:
    pool = BlockPool(num_blocks=8, page_size=4)
    x, y = pool.allocate(range(12)), pool.allocate(range(50, 56))
    for seq in (x, y):
        pool.commit(seq)
    for seq in (x, y):
        pool.free(seq)
    z = pool.allocate(range(9))
    pool.commit(z)
    pool.free(z)
    cached = {i for i in range(pool.num_blocks) if pool.block(i).state == "cached"}
    expected = [block_id for block_id in pool.allocate(range(100, 128)).block_ids if block_id in cached]
    expect(expected, answer, "the evicted blocks")
