"""Rows of measurements: in CSV files, next to earlier rows, and as text tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from ..files import csv_text, replace_text
from .tables import text_table


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        benchmark, case, implementation: names.
        p20_us, p50_us, p80_us: percentiles of the time of one call, in µs.
        samples: number of measured times.
        bytes: bytes a gather has to move: codes and scales read once, rows written once; 0 for calls that gather
            nothing. For attention: bytes of codes and scales, read once. In a row named "peak memory": that peak.
        gb_per_s: bytes over the median, in 10⁹ bytes per second.
        share_of_cast: the contiguous cast's median per byte over this row's, from the same run; 0 without a cast.
        against_loop: the Python loop's median over this row's, from the same run; 0 without the loop.
        against_token: the median of one program per (token, head) over this row's, from the same run; 0 without it.
        device, driver, torch, triton, commit, date: machine, versions and date.
        launches: a host time over the median of one raw launch, from the same run; 0 for other times.
        error: relative error against the float64 reference; 0 for rows that are compared in another way.
        peer_version: the package or file that an implementation of others came from, with its version; else empty.
        reason: why an implementation of others was not timed; its times are 0. Empty for all other rows.

    A file has the columns from `launches` on only if one of its rows has a value there.
    """

    benchmark: str
    case: str
    implementation: str
    p20_us: float
    p50_us: float
    p80_us: float
    samples: int
    bytes: int
    gb_per_s: float
    share_of_cast: float
    against_loop: float
    against_token: float
    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    launches: float = 0.0
    error: float = 0.0
    peer_version: str = ""
    reason: str = ""


_ALWAYS = tuple(field.name for field in fields(Row) if field.default is MISSING)
_OPTIONAL = tuple(field.name for field in fields(Row) if field.default is not MISSING)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a CSV file; they replace the file's rows of the same benchmark, case and device.

    Args:
        rows: the new rows.
        path: the file; its folder is created.

    Raises:
        ValueError: the columns of the existing file are not a row's.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    rows = list(rows)
    replaced = {(row.benchmark, row.case, row.device) for row in rows}
    old = read(path) if path.is_file() else []
    others = [row for row in old if (row.benchmark, row.case, row.device) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, as_csv([*others, *rows]))


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as the text of a CSV file."""
    columns = [*_ALWAYS, *(name for name in _OPTIONAL if any(getattr(row, name) for row in rows))]
    return csv_text(columns, map(asdict, rows))


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: the file's columns are not a row's.
    """
    types = {"int": int, "float": float, "str": str}
    convert = {field.name: types[str(field.type)] for field in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        if columns != (*_ALWAYS, *(name for name in _OPTIONAL if name in columns)):
            raise ValueError(
                f"{path} has columns {list(columns)}; accepted: {list(_ALWAYS)}, then any of {list(_OPTIONAL)}"
            )
        return [Row(**{name: convert[name](line[name]) for name in columns}) for line in reader]


def table(rows: Iterable[Row]) -> str:
    """Rows as text, a table for each case: times, relative to the case's first row too, and errors if there are any.

    Implementations that were not timed follow the case's table, with the reason.

    Args:
        rows: rows of one case after the other.
    """
    parts = []
    for case, group in groupby(rows, key=lambda row: row.case):
        lines = list(group)
        timed = [row for row in lines if not row.reason]
        cells = [_cells(row, timed[0]) for row in timed]
        headers, align = HEADERS, "lrrrrr"
        if any(row.error for row in timed):
            cells = [(*cell, f"{row.error:.1e}" if row.error else "") for cell, row in zip(cells, timed, strict=True)]
            headers, align = (*HEADERS, "error"), align + "r"
        parts += ["", case, text_table(cells, headers, align)]
        parts += [f"{row.implementation}: not timed: {row.reason}" for row in lines if row.reason]
    return "\n".join(parts)


HEADERS: tuple[str, ...] = ("", "median", "20 % to 80 %", "GB/s", "of the cast", "time")


def _cells(row: Row, first: Row) -> tuple[str, ...]:
    rate = f"{row.gb_per_s:.1f}" if row.bytes and row.gb_per_s else ""
    share = f"{row.share_of_cast:.3f}" if rate and row.share_of_cast else ""
    spread = f"{_time(row.p20_us)} to {_time(row.p80_us)}"
    relative = f"{row.p50_us / first.p50_us:.2f} ×" if first.p50_us else ""
    return row.implementation, _time(row.p50_us), spread, rate, share, relative


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} µs" if microseconds < 10_000 else f"{microseconds / 1000:.1f} ms"


def slug(device: str) -> str:
    """A device's name for a file name: "h100" for "NVIDIA H100 80GB HBM3"."""
    words = [word for word in re.split(r"[^a-z0-9]+", device.lower()) if word not in _MAKERS]
    size = next((at for at, word in enumerate(words) if re.fullmatch(r"\d+gb|sxm\d*|pcie|nvl|oam", word)), len(words))
    return "_".join(words[:size])


_MAKERS = ("", "nvidia", "amd", "geforce", "instinct", "tesla")
