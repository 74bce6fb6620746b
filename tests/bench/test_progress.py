"""The progress of a benchmark: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from kvgather.bench import progress
from kvgather.bench.progress import Progress

CASES = [SimpleNamespace(name=name) for name in ("NHD", "HND", "SHUFFLE")]
LINES = "[1/3] NHD\n[2/3] HND\n[3/3] SHUFFLE\n"
needs_tqdm = pytest.mark.skipif(progress.tqdm is None, reason="needs tqdm")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("with_tqdm", [False, pytest.param(True, marks=needs_tqdm)])
def test_a_file_gets_one_line_per_case(with_tqdm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_tqdm:
        monkeypatch.setattr(progress, "tqdm", None)
    file, output = io.StringIO(), io.StringIO()
    with Progress(file) as show:
        for case in show(CASES):
            show.say(f"rows of {case.name}", output)
    assert file.getvalue() == LINES
    assert output.getvalue() == "rows of NHD\nrows of HND\nrows of SHUFFLE\n"


@needs_tqdm
def test_a_terminal_gets_a_bar_that_is_removed() -> None:
    terminal, output = Terminal(), io.StringIO()
    with Progress(terminal) as show:
        for case in show(CASES):
            show.say(f"rows of {case.name}", output)
    shown = terminal.getvalue()
    assert "0/3" in shown and "2/3" in shown and "SHUFFLE" in shown and "\n" not in shown
    assert output.getvalue() == "rows of NHD\nrows of HND\nrows of SHUFFLE\n"
    assert not shown.rsplit("\r", 2)[1].strip(), "the bar is overwritten with spaces"


@needs_tqdm
def test_an_error_removes_the_bar() -> None:
    terminal = Terminal()
    with pytest.raises(ArithmeticError), Progress(terminal) as show:
        for _ in show(CASES):
            raise ArithmeticError
    assert not terminal.getvalue().rsplit("\r", 2)[1].strip()


def test_a_terminal_without_tqdm_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "tqdm", None)
    terminal = Terminal()
    with Progress(terminal) as show:
        assert list(show(CASES)) == CASES
        show.say("rows", terminal)
    assert terminal.getvalue() == LINES + "rows\n"
