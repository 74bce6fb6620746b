"""Rows of measurements: as CSV beside earlier ones, and as a table to read."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        benchmark, case, implementation: what was measured.
        p20_us, p50_us, p80_us: percentiles of the time of one call.
        samples: how many times were taken.
        bytes: what has to be moved: codes and scales read once, rows written once.
        gb_per_s: bytes over the median, in 10⁹ bytes per second.
        share_of_cast: the contiguous cast's median per byte over this one's, measured in the same run.
        against_loop: the Python loop's median over this one's, same run; 0 where the loop was not run.
        against_token: the one-program-per-(token, head) kernel's median over this one's, same run; 0 likewise.
        device, driver, torch, triton, commit, date: where and when.
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


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a CSV file, in place of the rows it has of the same benchmark, case and device."""
    rows = list(rows)
    replaced = {(row.benchmark, row.case, row.device) for row in rows}
    kept = [row for row in read(path) if (row.benchmark, row.case, row.device) not in replaced] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in [*kept, *rows])


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: the file's columns are not a row's.
    """
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        wanted = [field.name for field in fields(Row)]
        if reader.fieldnames != wanted:
            raise ValueError(f"{path} has columns {reader.fieldnames}; accepted: {wanted}")
        return [
            Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in fields(Row)}) for line in reader
        ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each, cases apart."""
    lines: list[str] = []
    width = max((len(row.implementation) for row in rows), default=0)
    case = ""
    for row in rows:
        if row.case != case:
            case = row.case
            lines += ["", case] if lines else [case]
        ratios = [f"{row.share_of_cast:.3f} of the cast"]
        ratios += [f"{row.against_token:.1f}× token-per-program"] if row.against_token else []
        ratios += [f"{row.against_loop:.1f}× loop"] if row.against_loop else []
        lines.append(
            f"  {row.implementation:<{width}}  {row.p50_us:10.1f} µs  {row.gb_per_s:7.1f} GB/s  " + ", ".join(ratios)
        )
    return "\n".join(lines)
