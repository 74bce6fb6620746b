"""Lengths, totals and offsets of a batch: three ways to say one thing, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import gt

from torch import Tensor

from ..formats.checks import check_int, described
from ..plan import PlanError

_MOST = 2**31 - 1
STEP = 1024
"""Key lengths of equal ranges are multiples of it: cuDNN makes a plan for each new length, which takes milliseconds."""


def check_lengths(lengths: object, name: str, batch: int) -> tuple[int, ...] | None:
    if lengths is None:
        return None
    if isinstance(lengths, (str, bytes, Tensor)) or not isinstance(lengths, Sequence):
        raise TypeError(f"{name} is {described(lengths)}; accepted: None, or a list of ints")
    if len(lengths) != batch:
        raise ValueError(f"{name} has {len(lengths)} lengths; accepted for {batch} sequences: {batch}")
    known = tuple(lengths)
    if set(map(type, known)) <= {int} and 0 <= min(known, default=0) and max(known, default=0) <= _MOST:
        return known
    return tuple(check_int(length, f"{name}[{i}]") for i, length in enumerate(known))


def total_of(given: int | None, which: str, known: tuple[int, ...] | None, offsets: Tensor, room: int) -> int:
    """total_q or total_k, from whatever says it; the offsets are read last, because to read them is to wait.

    Args:
        room: positions of the whole block table. Tokens past it are for `check()` to report, but a total that is far
            past it is garbage, and would only take the machine's memory.
    """
    name = f"total_{which}"
    if given is not None:
        total = check_int(given, name)
        if known is not None and sum(known) > total:
            raise ValueError(f"{name} is {total}; accepted for seqlens_{which} that sum to {sum(known)}: that or more")
        return total
    if known is not None:
        return check_int(sum(known), f"the sum of seqlens_{which}")
    return check_int(int(offsets[-1]), f"cu_seqlens_{which}[-1]", maximum=min(max(4 * room, 2**20), 2**31 - 1))


def longest_of(given: int | None, name: str, known: tuple[int, ...] | None, bound: int) -> int:
    longest = max(known, default=0) if known is not None else None
    if given is not None:
        given = check_int(given, name)
        if longest is not None and given < longest:
            raise ValueError(f"{name} is {given}; accepted: at least the longest of the lengths given, {longest}")
    if longest is not None:
        return longest
    return bound if given is None else min(given, bound)


def check_fit(known_q: tuple[int, ...] | None, known_k: tuple[int, ...] | None, room: int) -> None:
    """Raise unless each sequence's tokens fit into its row of the table, and its new tokens are among them."""
    if known_k is None:
        return
    if max(known_k, default=0) > room:
        sequence = next(i for i, length in enumerate(known_k) if length > room)
        raise ValueError(
            f"seqlens_k[{sequence}] is {known_k[sequence]}; accepted: at most {room}, which a row of block_table can "
            "hold"
        )
    if known_q is not None and any(map(gt, known_q, known_k)):
        sequence = next(i for i, pair in enumerate(zip(known_q, known_k, strict=True)) if gt(*pair))
        raise ValueError(
            f"seqlens_q[{sequence}] is {known_q[sequence]}, and seqlens_k[{sequence}] {known_k[sequence]}; accepted: "
            "seqlens_k counts cached + new tokens"
        )


def clamped(offsets: Tensor, total: int) -> Tensor:
    """Offsets that begin at 0, never fall and end at or below `total`."""
    used = offsets.cummax(0).values.clamp(0, total)
    used[:1] = 0
    return used


def check_offsets(given: Tensor, which: str, total: int, known: tuple[int, ...] | None) -> list[int]:
    """The lengths that offsets stand for, on the CPU.

    Raises:
        PlanError: they are no offsets, or not those of the lengths that the host was given.
    """
    name, numbers = f"cu_seqlens_{which}", given.tolist()
    if numbers[0] != 0:
        raise PlanError(f"{name}[0] is {numbers[0]}; accepted: 0")
    for sequence, (before, after) in enumerate(pairwise(numbers)):
        if not before <= after <= total:
            raise PlanError(
                f"{name}[{sequence + 1}] is {after}, after {before} (sequence {sequence}); accepted: offsets that "
                f"begin at 0, never fall, and end at or below total_{which}, {total}"
            )
        if known is not None and after - before != known[sequence]:
            raise PlanError(
                f"seqlens_{which}[{sequence}] is {known[sequence]}, and {name} says {after - before}; accepted: "
                "the same lengths in both"
            )
    return [after - before for before, after in pairwise(numbers)]


def check_row(row: Tensor, sequence: int, first: int, tokens: int, page_size: int, num_blocks: int) -> None:
    """Raise unless a row of a block table, on the CPU, has a block of the pool wherever the sequence has tokens."""
    reached = -(-tokens // page_size)
    bad = ((row[:reached] < 0) | (row[:reached] >= num_blocks)).nonzero()
    bad = bad[bad[:, 0] >= first // page_size]
    if len(bad) == 0 and reached <= len(row):
        return
    column = int(bad[0]) if len(bad) else len(row)
    what = f"is {int(row[column])}" if len(bad) else "is past the table's end"
    raise PlanError(
        f"block_table[{sequence}, {column}] (sequence {sequence}, column {column}) {what}; accepted: block ids 0 to "
        f"{num_blocks - 1} in every column that the sequence's tokens reach"
    )
