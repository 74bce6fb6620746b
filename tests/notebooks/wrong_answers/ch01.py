"""Plausible wrong answers of chapter 01, and what the check must say to each."""

from __future__ import annotations

SLOT = """def slot_of(position, block_ids, page_size):
    return {}
"""
CHUNK = """def chunk_slots(start, end, block_ids, page_size):
    table = torch.tensor(block_ids)
    positions = {positions}
    return {result}
"""
SLOTS = "table[positions // page_size] * page_size + positions % page_size"
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
        # the page offset forgotten
        (SLOT.format("block_ids[position // page_size] * page_size"), "position 1 of block table [5, 2, 7], page 4"),
        # the position instead of the page offset
        (SLOT.format("block_ids[position // page_size] * page_size + position"), "expected 8, got 12"),
        # the page size of the example
        (SLOT.format("block_ids[position // 4] * 4 + position % 4"), "block table [1, 0, 2], page 3"),
    ],
    "01.2": [
        # the chunk taken for the beginning of the sequence
        (
            CHUNK.format(positions="torch.arange(end - start)", result=SLOTS),
            "positions 4 to 7 of block table [5, 2, 7]",
        ),
        # the position instead of the page offset
        (
            CHUNK.format(positions="torch.arange(start, end)", result=SLOTS.replace(" % page_size", "")),
            "answer[4]: expected 8, got 12",
        ),
        # the last position counted in
        (CHUNK.format(positions="torch.arange(start, end + 1)", result=SLOTS), "expected shape [10], got [11]"),
        # a list
        (CHUNK.format(positions="torch.arange(start, end)", result=f"({SLOTS}).tolist()"), "expected a tensor"),
        # int32
        (CHUNK.format(positions="torch.arange(start, end)", result=f"({SLOTS}).int()"), "expected dtype torch.int64"),
    ],
    "01.3": [
        # the last token is covered
        (HITS.format(stop="len(tokens) + 1", prefix=WHOLE, miss="break"), "would cover the last token"),
        # goes on behind a miss
        (HITS.format(stop="len(tokens)", prefix=WHOLE, miss="continue"), "the second block was evicted"),
        # the tokens of the block without what comes before them
        (
            HITS.format(stop="len(tokens)", prefix="prefix = tuple(tokens[end - page_size : end])", miss="break"),
            "the next token differs): expected 2 values, got 1",
        ),
        # block id 0 taken for a miss
        (
            """def hit_blocks(tokens, published, page_size):
    hits, end = [], page_size
    while end < len(tokens) and (block_id := published.get(tuple(tokens[:end]))):
        hits.append(block_id)
        end += page_size
    return hits
""",
            "the third is block 0): expected 3 values, got 2",
        ),
        # a list is no key
        (HITS.format(stop="len(tokens)", prefix="prefix = tokens[:end]", miss="break"), "unhashable type: 'list'"),
    ],
    "01.4": [
        # step 4 forgotten
        ("evicted = [2, 1, 0]", "answer[1]: expected 3, got 1"),
        # a chain from its beginning
        ("evicted = [2, 3, 0]", "answer[2]: expected 1, got 0"),
        # everything that W takes, blank or not
        ("evicted = [6, 7, 4, 5, 2, 3, 1]", "answer[0]: expected 2, got 6"),
        # the block that was never full
        ("evicted = [2, 4, 3]", "answer[1]: expected 3, got 4"),
    ],
}
