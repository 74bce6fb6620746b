"""Rows of a running benchmark, printed and kept as they come: what was measured is not lost with what was not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ..files import check_replaceable
from . import report
from .progress import Progress

STDOUT = Path("-")


class RowWriter:
    """Called with the rows of each case; used as a context.

    Args:
        path: the CSV file that keeps the rows, in place of older ones of the same case and device; None keeps none.
            "-" is the standard output: the CSV comes in the end, and everything else goes to the standard error.
        progress: prints lines without breaking its bar.

    Raises:
        OSError, ValueError: at once, if no rows can be kept at `path`; and in the end, after the rows were printed as
            CSV, if they could not be written there.
    """

    def __init__(self, path: Path | None, progress: Progress) -> None:
        self._path = None if path == STDOUT else path
        self._csv_to_stdout = path == STDOUT
        self._progress = progress
        self._rows: list[report.Row] = []
        self._width = 0
        self._unkept: OSError | None = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            check_replaceable(self._path)
            if self._path.is_file():
                report.read(self._path)

    def __call__(self, rows: Sequence[report.Row]) -> None:
        first = not self._rows
        self._rows += rows
        self._width = max([self._width, *(len(row.implementation) for row in rows)])
        self._keep()
        self.say(report.table(rows, width=self._width, header=first))

    def say(self, text: str) -> None:
        """Print lines for people."""
        self._progress.say(text, sys.stderr if self._csv_to_stdout else sys.stdout)

    def _keep(self) -> None:
        """Write all rows; a disk that is full now may not be so after the next case."""
        if self._path is None:
            return
        before, self._unkept = self._unkept, None
        try:
            report.write(self._rows, self._path)
        except OSError as error:
            self._unkept = error
            if before is None:
                print(f"kvgather: rows are not kept yet: {error}", file=sys.stderr, flush=True)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._rows or isinstance(error, BrokenPipeError):
            return
        if self._unkept is not None:
            self._keep()
        if self._csv_to_stdout:
            print(report.as_csv(self._rows), end="", flush=True)
        elif self._unkept is not None:
            self.say(f"\n{report.as_csv(self._rows)}")
            if error is None:
                raise self._unkept
        elif self._path is not None:
            self.say(f"\n{len(self._rows)} rows in {self._path}")
