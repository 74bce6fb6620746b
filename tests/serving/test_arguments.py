"""Arguments of `serve` and `replay` are checked before anything starts; no server is started here."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from kvgather import cli
from kvgather.replay import run, table
from kvgather.replay.clients import Answer
from kvgather.replay.run import Outcome
from kvgather.serving import serve

REPLAY = ["replay", "--device", "cpu", "--commit", "abc", "--requests", "2"]
SERVE = ["serve", "--device", "cpu", "--random-weights"]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started: replays that succeed at once, and servers that end at once."""
    started: list[str] = []

    def replay(words: object, workload: Any, **_: object) -> Outcome:
        started.append("replay")
        return Outcome([Answer("x", "", 1.0)] * len(workload.prompts), "", {}, 1.0)

    monkeypatch.setattr(run, "replay", replay)
    monkeypatch.setattr(serve, "serve", lambda *_: started.append("serve"))
    return started


@pytest.mark.parametrize("command", [REPLAY, SERVE], ids=["replay", "serve"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gather", "before"], "--gather is before; accepted with --engine stock: after"),
        (["--guard"], "--guard is given; accepted with --engine stock: no --guard"),
        (["--layout", "HND"], "--layout is HND; accepted with --engine stock: NHD"),
        (["--scale", "per-head"], "--scale is per-head; accepted with --engine stock: per-tensor"),
        (["--path", "direct"], "--path is direct; accepted with --engine stock: auto"),
        (["--cache-dtype", "float32"], "--cache-dtype is float32; accepted with --engine stock: float8_e4m3fn"),
    ],
)
def test_the_stock_engine_refuses_arguments_of_ours(
    command: list[str], words: list[str], message: str, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--engine", "stock", *words]) == cli.USAGE
    assert message in capsys.readouterr().err and not started


def test_the_stock_engine_accepts_the_other_arguments(started: list[str]) -> None:
    words = ["--engine", "stock", "--page-size", "32", "--num-blocks", "64", "--no-sharing", "--layout", "NHD"]
    assert cli.main([*REPLAY, *words]) == cli.main([*SERVE, *words]) == cli.OK
    assert started == ["replay", "serve"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*REPLAY, "--page-size", "0"], "argument --page-size: 0 is not a count; accepted: 1 or more"),
        ([*REPLAY, "--page-size", "-1"], "argument --page-size: -1 is not a count; accepted: 1 or more"),
        ([*SERVE, "--page-size", "0"], "argument --page-size: 0 is not a count; accepted: 1 or more"),
        ([*SERVE, "--num-blocks", "0"], "argument --num-blocks: 0 is not a count; accepted: 1 or more"),
        ([*SERVE, "--max-batched-tokens", "x"], "argument --max-batched-tokens: x is not a count; accepted: 1 or more"),
        ([*REPLAY, "--warm-up", "-1"], "argument --warm-up: -1 is not a count; accepted: 0 or more"),
        ([*SERVE, "--port", "70000"], "argument --port: 70000 is not a port; accepted: 0 to 65535"),
        ([*SERVE, "--port", "-1"], "argument --port: -1 is not a port; accepted: 0 to 65535"),
    ],
)
def test_numbers_out_of_range(
    words: list[str], message: str, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert message in capsys.readouterr().err and not started


def test_numbers_at_the_ends_of_their_ranges(started: list[str]) -> None:
    assert cli.main([*REPLAY, "--page-size", "1", "--warm-up", "0"]) == cli.OK
    for port in ("0", "65535"):
        assert cli.main([*SERVE, "--port", port]) == cli.OK
    assert started == ["replay", "serve", "serve"]


def test_a_file_of_other_columns_is_refused_before_the_run(
    tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    assert cli.main([*REPLAY, "--csv", str(path)]) == cli.USAGE
    assert "rows.csv has columns ['a', 'b']; accepted: ['case'" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n" and not started


def test_a_folder_is_refused_before_the_run(
    tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*REPLAY, "--csv", str(tmp_path)]) == cli.FAILED
    assert f"{tmp_path} is a folder; accepted: the name of a file" in capsys.readouterr().err and not started


def test_a_new_file_in_a_new_folder_gets_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "rows.csv"
    assert cli.main([*REPLAY, "--csv", str(path)]) == cli.OK
    assert [row["completed"] for row in table.read(path)] == ["2"] and os.listdir(path.parent) == ["rows.csv"]
    assert f"1 row in {path}" in capsys.readouterr().out


def test_a_dash_is_the_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*REPLAY, "--csv", "-"]) == cli.OK
    captured = capsys.readouterr()
    (row,) = csv.DictReader(captured.out.splitlines())
    assert (row["completed"], row["commit"]) == ("2", "abc") and "completed     2" in captured.err
    assert not list(tmp_path.iterdir())
