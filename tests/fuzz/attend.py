"""Attention as the formula says, one number at a time: an oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tests.fuzz.case import Wrong
from tests.fuzz.floats import name_of

TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Of a row, next to the largest value that it sees."""


@dataclass
class Row:
    """What one query row of one head comes to.

    Attributes:
        out: `[v_dim]`; NaN where the row has to be.
        lse: natural, the sink's included.
        largest: the largest magnitude among the values it sees.
        spare: it belongs to no sequence: its log-sum-exp is −inf, or the sink.
    """

    out: list[float]
    lse: float
    largest: float = 0.0
    spare: bool = False


def softmax_row(
    query: list[float], keys: list[list[float]], values: list[list[float]], scale: float, sink: float | None, dim: int
) -> Row:
    """One query over the keys that it sees."""
    scores = [scale * math.fsum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
    everything = scores if sink is None else [*scores, sink]
    if any(math.isnan(x) for x in everything) or any(math.isnan(x) for value in values for x in value):
        return Row([math.nan] * dim, math.nan)
    if not everything or max(everything) == -math.inf:
        return Row([0.0] * dim, -math.inf)
    top = max(everything)
    total = math.fsum(math.exp(x - top) for x in everything)
    weights = [math.exp(x - top) / total for x in scores]
    out = [math.fsum(w * value[d] for w, value in zip(weights, values, strict=True)) for d in range(dim)]
    return Row(out, top + math.log(total), max((abs(x) for value in values for x in value), default=0.0))


def check_row(name: str, got: list[float], lse: float | None, want: Row, dtype: object) -> None:
    """Raise unless one row of one head is right within the rounding of q's dtype."""
    nan = [math.isnan(x) for x in want.out]
    if any(nan) or math.isnan(want.lse):
        if not all(map(math.isnan, got)) or not (lse is None or math.isnan(lse)):
            raise Wrong(f"{name} is {got[:3]}… with log-sum-exp {lse}, and should be NaN")
        return
    close = TOLERANCE[name_of(dtype)]
    worst = max((abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(got, want.out, strict=True)), default=0.0)
    if worst > close * want.largest:
        raise Wrong(f"{name} is {got[:4]}…, and should be {want.out[:4]}…: {worst:.3g} off")
    if lse is None or (want.spare and lse == -math.inf):
        return
    if want.lse == -math.inf or lse in (math.inf, -math.inf) or math.isnan(lse):
        if lse != want.lse:
            raise Wrong(f"{name} has log-sum-exp {lse}, and should have {want.lse}")
    elif abs(lse - want.lse) > close * (1 + abs(want.lse)):
        raise Wrong(f"{name} has log-sum-exp {lse}, and should have {want.lse}")


def check_all(out: Tensor, lse: Tensor | None, rows: list[list[Row]]) -> None:
    """Raise unless all rows are right; `rows` is `[n][q_heads]`."""
    numbers, logs = out.float().tolist(), None if lse is None else lse.tolist()
    for i, heads in enumerate(rows):
        for h, want in enumerate(heads):
            check_row(f"out[{i}, {h}]", numbers[i][h], None if logs is None else logs[i][h], want, out.dtype)
