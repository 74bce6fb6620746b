"""Rows of `kvgather bench parallel`: in CSV files, and as text tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from ...cases.context import ContextCase
from ...files import csv_text, replace_text
from ..tables import text_table
from .turns import Times


@dataclass(frozen=True)
class Row:
    """One way of one case. Times are in µs, of the slowest rank; empty without a CUDA graph, or where they say nothing.

    Attributes:
        case: its name.
        what: "one GPU": rank 0 alone, with the whole context. "ideal": one GPU's time over the number of ranks.
            "context parallel": the call on all ranks. Its parts, each alone: "local attention" (the write of new tokens
            included), "all-gather", "merge". "sum of parts".
        ranks, context, new: numbers of ranks, cached tokens and new tokens.
        path: the path of `prefix_attention` that `auto` takes.
        graph_us, graph_p20_us, graph_p80_us: median and percentiles of one call in a CUDA graph.
        eager_us, eager_p20_us, eager_p80_us: the same of one call in a loop on the host, its time included.
        samples: measured times.
        above_ideal_graph_us, above_ideal_eager_us: the call's time less the ideal.
        efficiency_graph, efficiency_eager: the ideal over the call's time.
        bytes_received: bytes that one call brings from the other ranks to this one.
        bytes_least: those that it has to bring at least, see `kvgather.parallel.states.least_bytes`.
        link: how the GPUs are linked.
        no_graph: why there is no CUDA graph, or "".
        device, driver, torch, triton, nccl, commit, date: machine, versions and date.
    """

    case: str
    what: str
    ranks: int
    context: int
    new: int
    path: str
    graph_us: float | None
    graph_p20_us: float | None
    graph_p80_us: float | None
    eager_us: float | None
    eager_p20_us: float | None
    eager_p80_us: float | None
    samples: int
    above_ideal_graph_us: float | None
    above_ideal_eager_us: float | None
    efficiency_graph: float | None
    efficiency_eager: float | None
    bytes_received: int | None
    bytes_least: int | None
    link: str
    no_graph: str
    device: str
    driver: str
    torch: str
    triton: str
    nccl: str
    commit: str
    date: str


ONE, IDEAL, TOGETHER, SUM = "one GPU", "ideal", "context parallel", "sum of parts"
LOCAL, GATHER, MERGE = PARTS = ("local attention", "all-gather", "merge")
COLUMNS = tuple(field.name for field in fields(Row))

Pair = tuple[float | None, float | None]
"""A number for calls in a CUDA graph, and one for eager calls."""
NOTHING: Pair = None, None


def rows_of(
    case: ContextCase, times: Mapping[str, Times], paths: Mapping[str, str], ranks: int, wire: tuple[int, int],
    where: Mapping[str, Any],
) -> list[Row]:  # fmt: skip
    """The rows of a case.

    Args:
        case: what was measured.
        times: of `ONE`, `TOGETHER` and all of `PARTS`.
        paths: those that `auto` takes, by way.
        ranks: how many there are.
        wire: bytes that one call of `TOGETHER` receives, and the least possible.
        where: the columns about the link, the machine and the versions.
    """
    medians: dict[str, Pair] = {
        what: (each.graph.p50 if each.graph else None, each.eager.p50) for what, each in times.items()
    }
    ideal = medians[IDEAL] = _each(lambda one: one / ranks, medians[ONE])
    medians[SUM] = _each(lambda *parts: sum(parts), *(medians[part] for part in PARTS))
    rows = []
    for what in (ONE, IDEAL, TOGETHER, *PARTS, SUM):
        above = efficiency = NOTHING
        if what == TOGETHER:
            above = _each(lambda time, best: time - best, medians[what], ideal)
            efficiency = _each(lambda time, best: best / time, medians[what], ideal)
        measured = times.get(what)
        graph, eager = (measured.graph, measured.eager) if measured else (None, None)
        rows.append(
            Row(
                case=case.name, what=what, ranks=ranks, context=case.context, new=case.new, path=paths.get(what, ""),
                graph_us=_rounded(medians[what][0]), graph_p20_us=_rounded(graph.p20 if graph else None),
                graph_p80_us=_rounded(graph.p80 if graph else None),
                eager_us=_rounded(medians[what][1]), eager_p20_us=_rounded(eager.p20 if eager else None),
                eager_p80_us=_rounded(eager.p80 if eager else None), samples=eager.samples if eager else 0,
                above_ideal_graph_us=_rounded(above[0]), above_ideal_eager_us=_rounded(above[1]),
                efficiency_graph=_rounded(efficiency[0], 4), efficiency_eager=_rounded(efficiency[1], 4),
                bytes_received=wire[0] if what == TOGETHER else None,
                bytes_least=wire[1] if what == TOGETHER else None, no_graph=measured.no_graph if measured else "",
                **where,
            )
        )  # fmt: skip
    return rows


def _each(combine: Callable[..., float], *pairs: Pair) -> Pair:
    """Combine times in a graph with each other, and eager ones likewise; None where one is None."""
    graph, eager = ([pair[at] for pair in pairs] for at in range(2))
    return (None if None in graph else combine(*graph)), (None if None in eager else combine(*eager))


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a CSV file; they replace the file's rows of the same case, ranks and device.

    Raises:
        ValueError: the columns of the existing file are not a row's.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    rows = list(rows)
    replaced = {(row.case, row.ranks, row.device) for row in rows}
    old = read(path) if path.is_file() else []
    others = [row for row in old if (row.case, row.ranks, row.device) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, as_csv([*others, *rows]))


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as the text of a CSV file."""
    return csv_text(COLUMNS, map(asdict, rows))


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: the file's columns are not a row's.
    """
    types = {"int": int, "float": float, "str": str}
    kinds = {field.name: str(field.type).split(" | ") for field in fields(Row)}

    def value_of(name: str, text: str) -> Any:
        return None if "None" in kinds[name] and not text else types[kinds[name][0]](text)

    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has columns {list(reader.fieldnames or ())}; accepted: {list(COLUMNS)}")
        return [Row(**{name: value_of(name, line[name]) for name in COLUMNS}) for line in reader]


HEADERS = ("", "graph", "20 % to 80 %", "eager", "20 % to 80 %", "above ideal", "efficiency", "bytes")


def table(rows: Iterable[Row]) -> str:
    """Rows as text, a table for each case; above the ideal and efficiency as "graph / eager"."""
    parts = []
    for case, group in groupby(rows, key=lambda row: row.case):
        lines = list(group)
        parts += ["", case, text_table([_cells(row) for row in lines], HEADERS, "lrrrrrrr")]
        parts += [f"no CUDA graph: {reason}" for reason in sorted({row.no_graph for row in lines} - {""})]
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    above = f"{_time(row.above_ideal_graph_us)} / {_time(row.above_ideal_eager_us)}"
    efficiency = f"{_share(row.efficiency_graph)} / {_share(row.efficiency_eager)}"
    received = "" if row.bytes_received is None else f"{row.bytes_received:,} (least {row.bytes_least:,})"
    compared = row.efficiency_eager is not None
    return (
        f"{row.what}, {row.path}" if row.path else row.what,
        _time(row.graph_us), _spread(row.graph_p20_us, row.graph_p80_us),
        _time(row.eager_us), _spread(row.eager_p20_us, row.eager_p80_us),
        above if compared else "", efficiency if compared else "", received,
    )  # fmt: skip


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    return f"{microseconds:.1f} µs" if abs(microseconds) < 10_000 else f"{microseconds / 1000:.1f} ms"


def _spread(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_time(low)} to {_time(high)}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
