"""Plausible wrong answers of chapter 01, and what the check must say to each."""

from __future__ import annotations

SLOT = """def slot_of(position, block_ids, page_size):
    return {}
"""
NEEDED = """def blocks_needed(lengths, page_size):
    return {}
"""
HITS = """def hit_blocks(tokens, published, page_size):
    hits = []
    for end in range(page_size, {stop}, page_size):
        {prefix}
        if prefix not in published:
            {miss}
        hits.append(published[prefix])
    return hits
"""
WHOLE = "prefix = tuple(tokens[:end])"

WRONG: dict[str, list[tuple[str, str]]] = {
    "01.1": [
        # the entry of the table taken for the block
        (
            SLOT.format("position // page_size * page_size + position % page_size"),
            "position 0 of block table [5, 2, 7]",
        ),
        # the offset forgotten
        (SLOT.format("block_ids[position // page_size] * page_size"), "position 1 of block table [5, 2, 7], page 4"),
        # the position instead of the offset
        (SLOT.format("block_ids[position // page_size] * page_size + position"), "expected 8, got 12"),
        # the page size of the example
        (SLOT.format("block_ids[position // 4] * 4 + position % 4"), "block table [1, 0, 2], page 3"),
    ],
    "01.2": [
        # one block more than the full ones, also where nothing is left over
        (NEEDED.format("sum(n // page_size + 1 for n in lengths)"), "lengths [16], page 16: expected 1, got 2"),
        # rounded down
        (NEEDED.format("sum(n // page_size for n in lengths)"), "lengths [10], page 4: expected 3, got 2"),
        # the sum rounded up: sequences would share blocks
        (NEEDED.format("(sum(lengths) + page_size - 1) // page_size"), "lengths [0, 1, 16, 33]"),
        # a division that is no integer
        (NEEDED.format("sum(n / page_size for n in lengths)"), "expected 3, got 2.5"),
    ],
    "01.3": [
        # the last token is covered
        (HITS.format(stop="len(tokens) + 1", prefix=WHOLE, miss="break"), "would cover the last token"),
        # goes on behind a miss
        (HITS.format(stop="len(tokens)", prefix=WHOLE, miss="continue"), "the second block was evicted"),
        # the tokens of the block without what comes before them
        (
            HITS.format(stop="len(tokens)", prefix="prefix = tuple(tokens[end - page_size : end])", miss="break"),
            "then comes something else): expected 2 values, got 1",
        ),
        # a list is no key
        (HITS.format(stop="len(tokens)", prefix="prefix = tokens[:end]", miss="break"), "unhashable type: 'list'"),
    ],
    "01.4": [
        # step 4 forgotten
        ("evicted = [2, 1, 0]", "at index 1: expected 3, got 1"),
        # a chain from its beginning
        ("evicted = [2, 3, 0]", "at index 2: expected 1, got 0"),
        # everything that W takes, blank or not
        ("evicted = [6, 7, 4, 5, 2, 3, 1]", "at index 0: expected 2, got 6"),
        # the block that was never full
        ("evicted = [2, 4, 3]", "at index 1: expected 3, got 4"),
    ],
}
