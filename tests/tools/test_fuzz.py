"""The driver of the fuzzer: a process that dies or hangs costs one call, which is named and shown."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import fuzz
import pytest
from fuzz import Call, Children, table, told

CHILD = """
import json, os, sys, time
seed, first, end = map(int, sys.argv[1:4])
for number in range(first, end):
    if sys.argv[4:] == ["--show"]:
        print(f"call({number})")
        continue
    print("fuzz: " + json.dumps({"begin": number, "function": "even" if number % 2 == 0 else "odd"}), flush=True)
    if number == DIES: print("a last word", flush=True); os.abort()
    if number == DIES_LATE and first < number: os.abort()
    if number == HANGS: time.sleep(600)
    if number == EXITS: os._exit(0)
    more = {"wrong": "5 is not 6", "snippet": "five()"} if number == WRONG else {}
    outcome = "bad" if more else "refused" if number % 3 == 0 else "valid"
    print("fuzz: " + json.dumps({"end": number, "outcome": outcome, **more}), flush=True)
"""


@dataclass(frozen=True)
class Fake(Children):
    """Children that run a script of this test."""

    script: Path = Path()

    def command(self, first: int, end: int, *more: str) -> list[str]:
        return [sys.executable, str(self.script), str(self.seed), str(first), str(end), *more]


def fake(folder: Path, limit: float = 30.0, **numbers: int) -> Fake:
    where = {name: numbers.get(name, -1) for name in ("DIES", "DIES_LATE", "HANGS", "EXITS", "WRONG")}
    script = folder / "child.py"
    script.write_text("".join(f"{name} = {number}\n" for name, number in where.items()) + CHILD)
    return Fake(seed=0, limit=limit, script=script)


def test_all_calls_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BATCH", 4)
    calls = list(fake(tmp_path, WRONG=5).all_of(2, 12))
    assert [call.number for call in calls] == list(range(2, 12))
    assert [call.number for call in calls if call.outcome == "refused"] == [3, 6, 9]
    (bad,) = (call for call in calls if call.outcome == "bad")
    assert (bad.number, bad.function, bad.wrong, bad.snippet) == (5, "odd", "5 is not 6", "five()")


def test_a_process_that_dies_costs_one_call(tmp_path: Path) -> None:
    calls = list(fake(tmp_path, DIES=3).all_of(0, 6))
    assert [call.outcome for call in calls] == ["refused", "valid", "valid", "bad", "valid", "valid"]
    assert "ended with -6; a last word" in calls[3].wrong and calls[3].snippet == "call(3)\n"


def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    calls = list(fake(tmp_path, limit=2.0, HANGS=1).all_of(0, 3))
    assert [call.outcome for call in calls] == ["refused", "bad", "valid"]
    assert "killed: no answer for 2 s" in calls[1].wrong and calls[1].snippet == "call(1)\n"


def test_a_call_that_dies_only_after_others(tmp_path: Path) -> None:
    calls = list(fake(tmp_path, DIES_LATE=2).all_of(0, 4))
    assert calls[2].outcome == "bad" and calls[2].wrong.endswith(
        "; alone it is valid: it takes calls from 0 on before it"
    )


def test_a_process_that_ends_quietly_in_a_call(tmp_path: Path) -> None:
    calls = list(fake(tmp_path, EXITS=1).all_of(0, 3))
    assert [call.outcome for call in calls] == ["refused", "bad", "valid"]


def test_a_process_that_cannot_run(tmp_path: Path) -> None:
    children = fake(tmp_path)
    children.script.write_text("raise SystemExit('no torch here')")
    with pytest.raises(SystemExit, match="the calls from 0 on cannot be run: the process ended with 1; no torch here"):
        list(children.all_of(0, 3))


def test_the_table() -> None:
    calls = [Call(0, "gather", "valid"), Call(1, "gather", "bad", "5"), Call(2, "cu_seqlens", "refused")]
    assert table(calls).splitlines() == [
        "function      calls    valid  refused    bad",
        "cu_seqlens        1        0        1      0",
        "gather            2        1        0      1",
        "all               3        1        1      1",
    ]
    assert "BAD call 1, gather: 5" in told(calls[1])


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fuzz, "Children", lambda seed, limit: fake(tmp_path, WRONG=7))
    assert fuzz.main(["--calls", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("5 calls of seed 0 from 0 on, 0 bad, in ")
    assert fuzz.main(["--only", "7"]) == 1
    printed = capsys.readouterr().out
    assert "BAD call 7, odd: 5 is not 6\n\nfive()" in printed and "1 calls of seed 0 from 7 on, 1 bad" in printed
    assert fuzz.main(["--first", "5", "--calls", "2", "--seed", "3"]) == 0
