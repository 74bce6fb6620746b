"""Rows of a running benchmark, printed and written to a file case by case: an interrupted run keeps its rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ..files import check_replaceable
from . import report
from .progress import Progress

STDOUT = Path("-")


class Form(Protocol):
    """A module of rows: `bench.report`, or `bench.ranks.rows`."""

    def read(self, path: Path) -> list[Any]: ...

    def write(self, rows: Any, path: Path) -> None: ...

    def as_csv(self, rows: Any) -> str: ...

    def table(self, rows: Any) -> str: ...


class RowWriter:
    """Call it with the rows of each case; use it as a context.

    Args:
        path: the CSV file of the rows, which replace its rows of the same case and device; None writes no file. "-" is
            the standard output: it gets the CSV at the end, and the standard error gets everything else.
        progress: prints text without breaking the progress bar.
        form: the module of the rows.

    Raises:
        OSError, ValueError: at once, if the file cannot be written or is not a file of rows; at the end, after printing
            the rows as CSV, if writing them failed.
    """

    def __init__(self, path: Path | None, progress: Progress, form: Form = report) -> None:
        self._form = form
        self._path = None if path == STDOUT else path
        self._csv_to_stdout = path == STDOUT
        self._progress = progress
        self._rows: list[Any] = []
        self._unkept: OSError | None = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            check_replaceable(self._path)
            if self._path.is_file():
                form.read(self._path)

    def __call__(self, rows: Sequence[Any]) -> None:
        self._rows += rows
        self._keep()
        self.say(self._form.table(rows))

    def say(self, text: str) -> None:
        """Print text for people."""
        self._progress.say(text, sys.stderr if self._csv_to_stdout else sys.stdout)

    def _keep(self) -> None:
        """Write all rows; if that fails now, it may succeed after the next case."""
        if self._path is None:
            return
        before, self._unkept = self._unkept, None
        try:
            self._form.write(self._rows, self._path)
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
            print(self._form.as_csv(self._rows), end="", flush=True)
        elif self._unkept is not None:
            self.say(f"\n{self._form.as_csv(self._rows)}")
            if error is None:
                raise self._unkept
        elif self._path is not None:
            self.say(f"\n{len(self._rows)} rows in {self._path}")
