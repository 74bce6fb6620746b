"""Rows of measurements: as CSV beside earlier ones, and as a table to read."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..files import replace_text


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        benchmark, case, implementation: what was measured.
        p20_us, p50_us, p80_us: percentiles of the time of one call.
        samples: how many times were taken.
        bytes: what has to be moved: codes and scales read once, rows written once; 0 of what gathers nothing. Of
            attention: codes and scales read once; or a peak of memory, if the row is named so.
        gb_per_s: bytes over the median, in 10⁹ bytes per second.
        share_of_cast: the contiguous cast's median per byte over this one's, measured in the same run; 0 where no cast
            was.
        against_loop: the Python loop's median over this one's, same run; 0 where the loop was not run.
        against_token: the one-program-per-(token, head) kernel's median over this one's, same run; 0 likewise.
        device, driver, torch, triton, commit, date: where and when.
        launches: of a host time, over the median of one raw launch in the same run; 0 elsewhere. A file in which no row
            has any has no such column.
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


_COLUMNS = tuple(field.name for field in fields(Row))
_ALWAYS = _COLUMNS[:-1]


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a CSV file, in place of the rows it has of the same benchmark, case and device; makes its folder.

    Raises:
        ValueError: the file that is there is not one of rows.
        OSError: it cannot be written; what was there is as it was.
    """
    rows = list(rows)
    replaced = {(row.benchmark, row.case, row.device) for row in rows}
    old = read(path) if path.is_file() else []
    kept = [row for row in old if (row.benchmark, row.case, row.device) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, as_csv([*kept, *rows]))


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as the text of a CSV file."""
    columns = _COLUMNS if any(row.launches for row in rows) else _ALWAYS
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return file.getvalue()


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
        if columns not in (_ALWAYS, _COLUMNS):
            raise ValueError(f"{path} has columns {list(columns)}; accepted: {list(_ALWAYS)}, and {_COLUMNS[-1]} last")
        return [Row(**{name: convert[name](line[name]) for name in columns}) for line in reader]


def table(rows: Sequence[Row], *, width: int = 0, header: bool = True) -> str:
    """The rows as text, one line each, cases apart; the last column is the time against the case's first row.

    Args:
        rows: of one case after the other.
        width: of the first column, at least.
        header: whether the first line names the columns.
    """
    width = max([width, *(len(row.implementation) for row in rows)])
    columns = f"{'median':>10}  {'20 % to 80 %':>22}  {'GB/s':>7}  {'of the cast':>11}  {'time':>8}"
    lines = [f"{'':{width + 2}}  {columns}"] if header else []
    case, first = "", 0.0
    for row in rows:
        if row.case != case:
            case, first = row.case, row.p50_us
            lines += ["", case]
        spread = f"{_time(row.p20_us)} to {_time(row.p80_us)}"
        share = f"{row.share_of_cast:11.3f}" if row.share_of_cast else f"{'':11}"
        moved = f"{row.gb_per_s:7.1f}  {share}" if row.bytes and row.gb_per_s else f"{'':7}  {'':11}"
        time = f"{_time(row.p50_us):>10}  {spread:>22}"
        lines.append(f"  {row.implementation:<{width}}  {time}  {moved}  {row.p50_us / first:6.2f} ×")
    return "\n".join(lines)


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} µs" if microseconds < 10_000 else f"{microseconds / 1000:.1f} ms"


def slug(device: str) -> str:
    """A device's name in the name of a file: "h100" of "NVIDIA H100 80GB HBM3", "cpu" of any CPU's."""
    words = [word for word in re.split(r"[^a-z0-9]+", device.lower()) if word not in _MAKERS]
    size = next((at for at, word in enumerate(words) if re.fullmatch(r"\d+gb|sxm\d*|pcie|nvl|oam", word)), len(words))
    return "_".join(words[:size])


_MAKERS = ("", "nvidia", "amd", "geforce", "instinct", "tesla")
