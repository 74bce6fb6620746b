"""Every function that is fuzzed, and how often."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import gathers
from tests.fuzz.case import Case, Draw

MAKERS: list[tuple[Callable[[Draw], Case], int]] = [
    (gathers.build_plan, 10),
    (gathers.gather, 18),
    (gathers.engines_call, 14),
]


def case_of(seed: int, number: int) -> Case:
    """Call `number` of a seed; the others have no part in it."""
    draw = Draw(seed, number)
    makers, shares = zip(*MAKERS, strict=True)
    return draw.choices(makers, shares)[0](draw)  # type: ignore[no-any-return]
