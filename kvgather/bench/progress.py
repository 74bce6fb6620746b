"""The progress of a benchmark: tqdm's bar on a terminal, one line per case elsewhere and without tqdm."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from .runner import AnyCase

try:
    from tqdm import tqdm
except ImportError:  # it comes with kvgather[bench]
    tqdm = None


class Progress:
    """Iterates over cases and shows the progress; used as a context, it removes its bar at the end.

    Args:
        file: where the progress is shown; default: the standard error.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._bar: Any = None

    def __call__(self, cases: Sequence[AnyCase]) -> Iterator[AnyCase]:
        if tqdm is not None and self._file.isatty():
            self._bar = tqdm(cases, file=self._file, unit="case", mininterval=0, leave=False)
            for case in self._bar:
                self._bar.set_postfix_str(case.name)
                yield case
            return
        for nth, case in enumerate(cases, 1):
            print(f"[{nth}/{len(cases)}] {case.name}", file=self._file, flush=True)
            yield case

    def say(self, text: str, file: TextIO) -> None:
        """Print lines without breaking the bar."""
        if self._bar is None:
            print(text, file=file, flush=True)
        else:
            tqdm.write(text, file=file)
            file.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
