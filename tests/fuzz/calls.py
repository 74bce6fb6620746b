"""Every function that is fuzzed, and how often."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import attentions, batches, blocks, caches, engines, gathers, histories, new_caches, others
from tests.fuzz.case import Case, Draw

MAKERS: list[tuple[Callable[[Draw], Case], int]] = [
    (gathers.build_plan, 10),
    (gathers.gather, 18),
    (engines.engines_call, 14),
    (new_caches.constructor, 6),
    (new_caches.from_tensors, 6),
    (caches.write, 14),
    (caches.cache_gather, 8),
    (caches.cache_check, 2),
    (blocks.cu_seqlens, 3),
    (blocks.pool_of, 1),
    (histories.history, 10),
    (batches.build_batch, 8),
    (batches.check_batch, 4),
    (batches.check_plan, 3),
    (batches.equality, 1),
    (batches.explain, 4),
    (attentions.prefix_attention, 22),
    (attentions.merge_states, 5),
    (others.device, 3),
    (others.fenced, 4),
]


def case_of(seed: int, number: int) -> Case:
    """Call `number` of a seed; the others have no part in it."""
    draw = Draw(seed, number)
    makers, shares = zip(*MAKERS, strict=True)
    return draw.choices(makers, shares)[0](draw)  # type: ignore[no-any-return]
