"""How far a benchmark is: a bar where a person is watching, plain lines where not."""

from __future__ import annotations

import re
import shutil
import sys
import time
from typing import TextIO

_LINE = re.compile(r"\[(\d+)/(\d+)\] (.*)")


class Progress:
    """Called with a line `[3/72] what` before each step; used as a context, it clears its bar in the end."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._begin = time.monotonic()
        self._bar = self._file.isatty()

    def __call__(self, line: str) -> None:
        found = _LINE.fullmatch(line)
        if not (self._bar and found):
            print(line, file=self._file, flush=True)
            return
        nth, count = int(found[1]), int(found[2])
        done, passed = nth - 1, time.monotonic() - self._begin
        left = f"{_clock(passed / done * (count - done))} left" if done else "     left"
        bar = "█" * (20 * done // count)
        text = f"{bar:░<20} {nth}/{count}  {left:>10}  {found[3]}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:width]}", end="", file=self._file, flush=True)

    def __enter__(self) -> Progress:
        return self

    def clear(self) -> None:
        """Take the bar away, for lines that go to the same terminal; the next step draws it again."""
        if self._bar:
            print("\r\x1b[K", end="", file=self._file, flush=True)

    def __exit__(self, *_: object) -> None:
        self.clear()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
