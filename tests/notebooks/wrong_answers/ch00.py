"""Plausible wrong answers of chapter 00, and what the check must say to each."""

from __future__ import annotations

BLOCKS = """def blocks_needed(num_tokens, page_size):
    return {}
"""

WRONG: dict[str, list[tuple[str, str]]] = {
    "00.1": [
        ("tokens = 16", "tokens: expected 48, got 16"),
        ("tokens = 3 + 16", "tokens: expected 48, got 19"),
        ("tokens = '48'", "expected 48, got a str, '48'"),
    ],
    "00.2": [
        # the rest forgotten
        (BLOCKS.format("num_tokens // page_size"), "33 tokens, page_size 16: expected 3, got 2"),
        # always one more
        (BLOCKS.format("num_tokens // page_size + 1"), "32 tokens, page_size 16: expected 2, got 3"),
        # never none
        (BLOCKS.format("max(1, -(-num_tokens // page_size))"), "0 tokens, page_size 16: expected 0, got 1"),
        # the page size of the example
        (BLOCKS.format("(num_tokens + 15) // page_size"), "10 tokens, page_size 4: expected 3, got 6"),
        (BLOCKS.format("num_tokens / page_size"), "2.0 is a float"),
        (BLOCKS.format("num_tokens // pagesize"), "NameError: name 'pagesize' is not defined, on line 2 of your cell"),
    ],
}
