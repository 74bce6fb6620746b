"""What a paged cache holds, element by element: an oracle in plain loops over numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.case import Wrong
from tests.fuzz.floats import FP8, ROUND, TINY, decode, encode, name_of, product, quotient, to_float32

Where = tuple[int, int] | str | None
"""What a row holds: (block, slot); "bad", rows of NaN; or None, nothing that was gathered."""


def listed(tensor: Tensor) -> list[Any]:
    """A pool's elements as nested lists: bytes of FP8, numbers of others."""
    return tensor.view(torch.uint8).tolist() if name_of(tensor.dtype) in FP8 else tensor.tolist()


@dataclass
class Pool:
    """One pool, read through its layout.

    Attributes:
        elements: nested lists, as the tensor is shaped.
        flat: with NHD's shape and SHUFFLE's bytes, as engines keep them.
    """

    elements: list[Any]
    layout: str
    which: str
    dtype: str
    blocks: int
    page: int
    heads: int
    dim: int
    flat: bool = False

    @classmethod
    def of(cls, tensor: Tensor, layout: str, which: str, flat: bool = False) -> Pool:
        shape, dtype = list(tensor.shape), name_of(tensor.dtype)
        if layout == "NHD" or flat:
            blocks, page, heads, dim = shape
        elif layout == "HND":
            blocks, heads, page, dim = shape
        elif which == "key":
            blocks, heads, page, dim = shape[0], shape[1], shape[3], shape[2] * shape[4]
        else:
            blocks, heads, page, dim = shape[0], shape[1], shape[2] * shape[4], shape[3]
        elements = listed(tensor.flatten(1) if flat else tensor)
        return cls(elements, layout, which, dtype, blocks, page, heads, dim, flat)

    @property
    def x(self) -> int:
        return 16 // {"float32": 4, "float16": 2, "bfloat16": 2}.get(self.dtype, 1)

    def path(self, block: int, slot: int, head: int, dim: int) -> tuple[int, ...]:
        """The indices of an element."""
        x = self.x
        if self.flat and self.which == "key":
            return block, ((head * (self.dim // x) + dim // x) * self.page + slot) * x + dim % x
        if self.flat:
            return block, ((head * (self.page // x) + slot // x) * self.dim + dim) * x + slot % x
        if self.layout == "NHD":
            return block, slot, head, dim
        if self.layout == "HND":
            return block, head, slot, dim
        if self.which == "key":
            return block, head, dim // x, slot, dim % x
        return block, head, slot // x, dim, slot % x

    def stored(self, block: int, slot: int, head: int, dim: int) -> float:
        """An element: a byte of FP8, or a number."""
        at: Any = self.elements
        for index in self.path(block, slot, head, dim):
            at = at[index]
        return at

    def store(self, block: int, slot: int, head: int, dim: int, value: float) -> None:
        *path, last = self.path(block, slot, head, dim)
        at: Any = self.elements
        for index in path:
            at = at[index]
        at[last] = value

    def value(self, block: int, slot: int, head: int, dim: int) -> float:
        stored = self.stored(block, slot, head, dim)
        return decode(int(stored), self.dtype) if self.dtype in FP8 else stored


class Scales:
    """A scale by block, head and slot."""

    def __init__(self, given: Any, kind: str | None = None) -> None:
        self.none = given is None
        self.one = not isinstance(given, Tensor) or (given.numel() == 1 and kind in (None, "per-tensor"))
        if isinstance(given, Tensor):
            self.values = given.flatten().tolist()[0] if self.one else given.tolist()
        else:
            self.values = None if given is None else to_float32(float(given))
        self.rank = given.ndim if isinstance(given, Tensor) else 0

    def at(self, block: int, head: int, slot: int) -> float | None:
        if self.none or self.one:
            return self.values
        return (
            self.values[head] if self.rank == 1
            else self.values[block][head] if self.rank == 2
            else self.values[block][head][slot]
        )  # fmt: skip


def used_offsets(given: Sequence[int], total: int) -> list[int]:
    """Offsets that never fall, and end at or below `total`."""
    largest, used = -(2**63), []
    for offset in given:
        largest = max(largest, offset)
        used.append(min(max(largest, 0), total))
    return used


def rows_of_plan(
    table: list[list[int]], cu: list[int], starts: list[int] | None, page: int, blocks: int, total: int
) -> list[Where]:
    """What each row of a gather holds."""
    rows: list[Where] = [None] * total
    used = used_offsets(cu, total)
    for b, ids in enumerate(table):
        start = 0 if starts is None else starts[b]
        for i in range(used[b + 1] - used[b]):
            column, slot = divmod(start + i, page)
            known = start >= 0 and column < len(ids) and 0 <= ids[column] < blocks
            rows[used[b] + i] = (ids[column], slot) if known else "bad"
    return rows


def gathered(pool: Pool, scale: Scales, row: Where, rounding: str | None) -> list[list[float]]:
    """`[heads][dim]` of a row, rounded to a dtype; not at all for None."""
    out = []
    for head in range(pool.heads):
        if not isinstance(row, tuple):
            out.append([math.nan] * pool.dim)
            continue
        factor = scale.at(row[0], head, row[1])
        values = [pool.value(*row, head, dim) for dim in range(pool.dim)]
        if factor is not None:
            values = [product(value, factor) for value in values]
        out.append(values if rounding is None else [ROUND[rounding](value) for value in values])
    return out


def check_rows(name: str, got: Tensor, before: Tensor | None, pool: Pool, scale: Scales, rows: list[Where]) -> None:
    """Raise unless gathered rows are right to the bit, and others as they were."""
    dtype = name_of(got.dtype)
    raw = dtype in FP8
    bits = got.view(torch.uint8) if raw else got.float()
    for i, row in enumerate(rows):
        if row is None:
            continue
        if raw:
            check_codes(f"{name}[{i}]", bits[i], pool, row)
            continue
        want = torch.tensor(gathered(pool, scale, row, dtype), dtype=torch.float32)
        check_equal(f"{name}[{i}], {row}", bits[i], want)
    if before is not None:
        others = [i for i in range(len(got)) if i >= len(rows) or rows[i] is None]
        was = before.view(torch.uint8) if raw else before.float()
        check_equal(f"{name}, rows that are not written", bits[others].float(), was[others].float())


def check_codes(name: str, got: Tensor, pool: Pool, row: Where) -> None:
    """Raise unless codes were copied as they are; NaN is NaN whatever its code."""
    for head, codes in enumerate(got.tolist()):
        for dim, code in enumerate(codes):
            want = pool.stored(*row, head, dim) if isinstance(row, tuple) else None
            is_nan = math.isnan(decode(code, pool.dtype))
            if not (is_nan if want is None or math.isnan(decode(int(want), pool.dtype)) else code == want):
                raise Wrong(f"{name}[{head}, {dim}] is code {code}, and should be {want}")


def check_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Raise unless FP32 numbers have the same bits; NaN is NaN."""
    if got.shape != want.shape:
        raise Wrong(f"{name} has shape {list(got.shape)}, and should have {list(want.shape)}")
    equal = (got.contiguous().view(torch.int32) == want.contiguous().view(torch.int32)) | (got.isnan() & want.isnan())
    if not bool(equal.all()):
        at = (~equal).nonzero()[0].tolist()
        raise Wrong(f"{name}{at} is {got[tuple(at)].item()!r}, and should be {want[tuple(at)].item()!r}")


def write_row(pool: Pool, scale: Scales, row: list[list[float]], block: int, slot: int, new_scales: Any) -> None:
    """Put the row `[heads][dim]` of a token where it belongs.

    Args:
        new_scales: nested lists of a per-token-head scale, to be set; None for other kinds.
    """
    fp8 = pool.dtype in FP8
    for head, values in enumerate(row):
        factor = scale.at(block, head, slot)
        if new_scales is not None:
            finite = [abs(value) for value in values if math.isfinite(value)]
            largest = FP8[pool.dtype].largest if fp8 else 1.0
            factor = max(quotient(max(finite, default=0.0), largest), TINY)
            new_scales[block][head][slot] = factor
        for dim, value in enumerate(values):
            number = value if factor is None else quotient(value, factor)
            stored = encode(number, pool.dtype) if fp8 else ROUND[pool.dtype](number)
            pool.store(block, slot, head, dim, math.nan if stored is None else stored)


def check_pool(name: str, got: Tensor, pool: Pool) -> None:
    """Raise unless a pool's tensor has the elements of `pool`; NaN among FP8's is any of its codes."""
    have = torch.tensor(listed(got.flatten(1) if pool.flat else got), dtype=torch.float64)
    want = torch.tensor(pool.elements, dtype=torch.float64)
    if have.shape != want.shape:
        want = want.reshape(have.shape)
    equal = (have == want) & (torch.signbit(have) == torch.signbit(want)) | (have.isnan() & want.isnan())
    if pool.dtype in FP8:
        codes = have.long().tolist()
        nan = torch.tensor([math.isnan(decode(code, pool.dtype)) for code in range(256)])
        equal |= want.isnan() & nan[torch.tensor(codes, dtype=torch.int64)]
    if not bool(equal.all()):
        at = (~equal).nonzero()[0].tolist()
        raise Wrong(f"{name}{at} holds {have[tuple(at)].item()!r}, and should hold {want[tuple(at)].item()!r}")
