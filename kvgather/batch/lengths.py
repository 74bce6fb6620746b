"""Lengths, totals and offsets of a batch: three forms of the same information, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import gt

from torch import Tensor

from ..formats.checks import check_int, described
from ..plan import PlanError
from .share import Share

_INT32_MAX = 2**31 - 1
STEP = 1024
"""Unit of key lengths that all sequences share: cuDNN plans each new length, which takes milliseconds."""


def check_lengths(lengths: object, name: str, batch: int) -> tuple[int, ...] | None:
    """Return lengths as a tuple of `batch` ints from 0 to 2^31 − 1, or None.

    Raises:
        TypeError, ValueError: `lengths` is neither None nor a sequence of `batch` such ints.
    """
    if lengths is None:
        return None
    if isinstance(lengths, (str, bytes, Tensor)) or not isinstance(lengths, Sequence):
        raise TypeError(f"{name} is {described(lengths)}; accepted: None, or a list of ints")
    if len(lengths) != batch:
        raise ValueError(f"{name} has {len(lengths)} lengths; accepted for {batch} sequences: {batch}")
    items = tuple(lengths)
    if set(map(type, items)) <= {int} and 0 <= min(items, default=0) and max(items, default=0) <= _INT32_MAX:
        return items
    return tuple(check_int(length, f"{name}[{i}]") for i, length in enumerate(items))


def total_of(total: int | None, which: str, lengths: tuple[int, ...] | None, offsets: Tensor, capacity: int) -> int:
    """Return total_q or total_k, from the argument, the lengths or the offsets.

    The offsets come last, because reading them synchronizes with the device.

    Args:
        total: the argument, or None.
        which: "q" or "k".
        lengths: the sequences' lengths on the host, or None.
        offsets: cu_seqlens_q or cu_seqlens_k.
        capacity: positions of the whole block table. `check()` reports tokens past it. A total far beyond it is garbage
            and would exhaust the machine's memory, so it raises here.

    Raises:
        TypeError, ValueError: the total is wrong, or below the sum of the lengths.
    """
    name = f"total_{which}"
    if total is not None:
        total = check_int(total, name)
        if lengths is not None and sum(lengths) > total:
            raise ValueError(
                f"{name} is {total}; accepted for seqlens_{which} of sum {sum(lengths)}: {sum(lengths)} or more"
            )
        return total
    if lengths is not None:
        return check_int(sum(lengths), f"the sum of seqlens_{which}")
    return check_int(int(offsets[-1]), f"cu_seqlens_{which}[-1]", maximum=min(max(4 * capacity, 2**20), _INT32_MAX))


def longest_of(bound: int | None, name: str, lengths: tuple[int, ...] | None, limit: int) -> int:
    """Return max_q or max_k: the longest of the lengths, or else the smaller of the argument and `limit`.

    Args:
        bound: the argument max_q or max_k, or None.
        name: the argument's name, for errors.
        lengths: the sequences' lengths on the host, or None.
        limit: the longest length that the totals and the block table allow.

    Raises:
        TypeError, ValueError: the bound is wrong, or below the longest length.
    """
    longest = max(lengths, default=0) if lengths is not None else None
    if bound is not None:
        bound = check_int(bound, name)
        if longest is not None and bound < longest:
            raise ValueError(f"{name} is {bound}; accepted: at least {longest}, the longest of the lengths")
    if longest is not None:
        return longest
    return limit if bound is None else min(bound, limit)


def check_fit(seqlens_q: tuple[int, ...] | None, seqlens_k: tuple[int, ...] | None, row_tokens: int) -> None:
    """Raise unless each sequence's tokens fit into its row of the block table, and include its new tokens.

    Args:
        seqlens_q, seqlens_k: the lengths on the host, or None.
        row_tokens: positions of a row of the block table.

    Raises:
        ValueError: a sequence is too long, or has more new tokens than tokens.
    """
    if seqlens_k is None:
        return
    if max(seqlens_k, default=0) > row_tokens:
        sequence = next(i for i, length in enumerate(seqlens_k) if length > row_tokens)
        raise ValueError(
            f"seqlens_k[{sequence}] is {seqlens_k[sequence]}; accepted: at most {row_tokens}, the positions of a row "
            "of block_table"
        )
    if seqlens_q is not None and any(map(gt, seqlens_q, seqlens_k)):
        sequence = next(i for i, pair in enumerate(zip(seqlens_q, seqlens_k, strict=True)) if gt(*pair))
        raise ValueError(
            f"seqlens_q[{sequence}] is {seqlens_q[sequence]}, and seqlens_k[{sequence}] {seqlens_k[sequence]}; "
            "accepted: seqlens_k counts cached + new tokens"
        )


def clamped(offsets: Tensor, total: int) -> Tensor:
    """Return offsets that begin at 0, never decrease, and end at or below `total`."""
    result = offsets.cummax(0).values.clamp(0, total)
    result[:1] = 0
    return result


def check_offsets(offsets: Tensor, which: str, total: int, lengths: tuple[int, ...] | None) -> list[int]:
    """Return the lengths that offsets on the CPU give.

    Args:
        offsets: cu_seqlens_q or cu_seqlens_k, before clamping.
        which: "q" or "k".
        total: total_q or total_k.
        lengths: the lengths on the host, or None.

    Raises:
        PlanError: the offsets do not begin at 0, decrease, exceed the total, or disagree with the lengths.
    """
    name, numbers = f"cu_seqlens_{which}", offsets.tolist()
    if numbers[0] != 0:
        raise PlanError(f"{name}[0] is {numbers[0]}; accepted: 0")
    for sequence, (begin, end) in enumerate(pairwise(numbers)):
        if not begin <= end <= total:
            raise PlanError(
                f"{name}[{sequence + 1}] is {end}, after {begin} (sequence {sequence}); accepted: offsets that "
                f"begin at 0, never decrease, and end at or below total_{which}, {total}"
            )
        if lengths is not None and end - begin != lengths[sequence]:
            raise PlanError(
                f"seqlens_{which}[{sequence}] is {lengths[sequence]}, and {name} says {end - begin}; accepted: "
                "the same lengths in both"
            )
    return [end - begin for begin, end in pairwise(numbers)]


def check_row(
    row: Tensor, sequence: int, first: int, tokens: int, page_size: int, num_blocks: int, share: Share | None = None
) -> None:  # fmt: skip
    """Raise unless a row of a block table has a valid block id for each of a sequence's tokens.

    Args:
        row: `[max_blocks]`, on the CPU.
        sequence: its index, for errors.
        first: the first position to check; blocks before it may have been freed.
        tokens: the sequence's cached + new tokens.
        page_size, num_blocks: of the pool.
        share: whose columns are checked; None means all.

    Raises:
        PlanError: gives the column of the first bad entry.
    """
    num_pages = -(-tokens // page_size)
    bad = ((row[:num_pages] < 0) | (row[:num_pages] >= num_blocks)).nonzero()
    bad = bad[bad[:, 0] >= first // page_size]
    if share is not None:
        bad = bad[bad[:, 0] % share.ranks == share.rank]
    if len(bad) == 0 and num_pages <= len(row):
        return
    column = int(bad[0]) if len(bad) else len(row)
    problem = f"is {int(row[column])}" if len(bad) else "is past the table's end"
    raise PlanError(
        f"block_table[{sequence}, {column}] (sequence {sequence}, column {column}) {problem}; accepted: block ids 0 to "
        f"{num_blocks - 1} in every column that the sequence's tokens reach"
    )
