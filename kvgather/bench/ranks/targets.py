"""The targets of `kvgather bench parallel`, from measured rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..tables import text_table
from .rows import TOGETHER, Row


class Target(NamedTuple):
    """What to reach for one case.

    Attributes:
        context, new: of the case.
        most_above_us: largest time above the ideal, in µs; or None.
        least_efficiency: the least efficiency by number of ranks; {} for none, 0 is any number.
    """

    context: int
    new: int
    most_above_us: float | None = None
    least_efficiency: dict[int, float] = {}  # noqa: RUF012, is never changed


TARGETS = (
    Target(1_048_576, 1, most_above_us=40.0),
    Target(4_194_304, 1, least_efficiency={2: 0.90, 4: 0.85}),
    Target(1_048_576, 512, least_efficiency={0: 0.95}),
)


def summary(rows: Sequence[Row]) -> str:
    """A table of the targets and the measurements, in a CUDA graph and eagerly."""
    calls = {(row.context, row.new): row for row in rows if row.what == TOGETHER}
    ranks = rows[0].ranks if rows else 0
    cells = [line for target in TARGETS for line in _lines(target, ranks, calls.get((target.context, target.new)))]
    return text_table(cells, ("", "to reach", "in a graph", "", "eager", ""), "llrlrl")


def _lines(target: Target, ranks: int, row: Row | None) -> Iterator[tuple[str, ...]]:
    name = f"{target.new} new at {target.context:,}, {ranks} ranks"
    if target.most_above_us is not None:
        times = (row.above_ideal_graph_us, row.above_ideal_eager_us) if row else (None, None)
        yield (
            name,
            f"≤ {target.most_above_us:.0f} µs above ideal",
            *_measured(times, "{:.1f} µs", target.most_above_us, -1),
        )
    least = target.least_efficiency.get(ranks, target.least_efficiency.get(0))
    if least is not None:
        shares = (row.efficiency_graph, row.efficiency_eager) if row else (None, None)
        yield (name, f"efficiency ≥ {least:.2f}", *_measured(shares, "{:.3f}", least, 1))


def _measured(values: tuple[float | None, float | None], form: str, target: float, sign: int) -> tuple[str, ...]:
    """The cells of the measurement in a graph and of the eager one; `sign` is 1 if larger values are better."""
    cells: list[str] = []
    for value in values:
        if value is None:
            cells += ["not measured", ""]
        else:
            cells += [form.format(value), "reached" if sign * value >= sign * target else "NOT reached"]
    return tuple(cells)
