"""A prompt of three pages of 4 tokens, sequences that run it, and all that can be seen of a pool."""

from __future__ import annotations

from typing import Any

from kvgather.blocks import BlockPool, PooledSequence

PROMPT = list(range(10))  # blocks 0123, 4567, 89


def snapshot(pool: BlockPool, *seqs: PooledSequence) -> list[Any]:
    """Everything that can be seen of a pool, to compare before and after."""
    return [
        [pool.block(i) for i in range(pool.num_blocks)],
        pool.eviction_order(),
        pool.stats,
        [(list(s.block_ids), list(s.token_ids), s.num_cached_tokens, s.num_computed_tokens) for s in seqs],
    ]


def run_prompt(pool: BlockPool, tokens: list[int], extra_key: Any = None) -> PooledSequence:
    seq = pool.allocate(tokens, extra_key)
    pool.commit(seq)
    return seq
