"""The driver of memcheck: what it reads from the checker, and what it does when a process dies or hangs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import memcheck
import pytest
from memcheck import Checker, Verdict, read, share

CLEAN = """========= COMPUTE-SANITIZER
memcheck: {"begin": "a"}
memcheck: {"end": "a", "wrong": ""}
memcheck: {"begin": "b"}
memcheck: {"end": "b", "wrong": ""}
========= ERROR SUMMARY: 0 errors
"""
BAD = """========= COMPUTE-SANITIZER
memcheck: {"begin": "a"}
memcheck: {"end": "a", "wrong": ""}
memcheck: {"begin": "b"}
========= Invalid __shared__ read of size 1024 bytes
=========     at direct_kernel+0x3a0 in direct_kernel.py:212
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f2c40400a00 is out of bounds
=========
========= Invalid __global__ write of size 16 bytes
=========     at direct_kernel+0x3b0 in direct_kernel.py:230
memcheck: {"end": "b", "wrong": "CUDA error: unspecified launch failure"}
========= ERROR SUMMARY: 2 errors
"""
CHILD = """
import json, os, sys, time
for name in json.load(open(sys.argv[2])):
    print("memcheck: " + json.dumps({"begin": name}), flush=True)
    wrong = ""
    if name == "reads outside":
        print("========= Invalid __global__ read of size 4 bytes", flush=True)
        print("memcheck: " + json.dumps({"end": name, "wrong": "CUDA error"}), flush=True)
        os._exit(0)
    if name == "aborts": os.abort()
    if name == "hangs": time.sleep(600)
    if name == "gives wrong values": wrong = "AssertionError: 3 differ"
    print("memcheck: " + json.dumps({"end": name, "wrong": wrong}), flush=True)
"""
TOOL = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
errors = 0
for line in child.stdout:
    errors += line.startswith("========= Invalid")
    print(line, end="", flush=True)
status = child.wait()
if status == 0:
    print(f"========= ERROR SUMMARY: {errors} error" + "s" * (errors != 1), flush=True)
sys.exit(9 if errors else status)
"""


def test_a_clean_log() -> None:
    assert read(CLEAN.splitlines(), "it ended with status 0") == [Verdict("a"), Verdict("b")]


def test_a_bad_access_belongs_to_the_job_that_was_running() -> None:
    a, b = read(BAD.splitlines(), "it ended with status 9")
    assert a.clean and not b.clean
    assert b.errors == ["Invalid __shared__ read of size 1024 bytes", "Invalid __global__ write of size 16 bytes"]
    assert b.wrong == "CUDA error: unspecified launch failure"


def test_errors_that_no_job_shows_count_all_the_same() -> None:
    *jobs, rest = read(CLEAN.replace("0 errors", "3 errors").splitlines(), "")
    assert all(job.clean for job in jobs)
    assert rest == Verdict("the whole process", ["3 errors that no job shows"])


def test_a_log_that_breaks_off() -> None:
    cut = "\n".join(CLEAN.splitlines()[:4])
    assert read(cut.splitlines(), "it ended with status -6") == [
        Verdict("a"), Verdict("b", wrong="it ended with status -6")
    ]  # fmt: skip
    *jobs, rest = read(CLEAN.splitlines()[:-1], "it ended with status 1")
    assert all(job.clean for job in jobs) and len(jobs) == 2
    assert rest.wrong == "the checker gave no summary; it ended with status 1"


def test_shares_are_of_about_equal_length() -> None:
    jobs = [(f"{n}", float(n)) for n in range(20)]
    shares = share(jobs, 4)
    assert sorted(name for names in shares for name in names) == sorted(name for name, _ in jobs)
    loads = [sum(map(float, names)) for names in shares]
    assert len(shares) == 4 and max(loads) - min(loads) <= 5
    assert share(jobs[:1], 4) == [["0"]]


@pytest.fixture
def checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checker:
    """A checker that finds what a planted child prints, and gives no summary when the child dies."""
    (tmp_path / "planted_child.py").write_text(CHILD)
    (tmp_path / "tool.py").write_text(TOOL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Checker((sys.executable, str(tmp_path / "tool.py")), "cuda", 4.0, tmp_path / "cache", "planted_child")


def test_what_follows_a_process_that_ends_is_run_by_another(checker: Checker) -> None:
    names = ["fine", "reads outside", "gives wrong values", "aborts", "fine too"]
    verdicts = {verdict.name: verdict for verdict in checker.run(names)}
    assert list(verdicts) == names
    assert verdicts["fine"].clean and verdicts["fine too"].clean
    assert verdicts["reads outside"].errors == ["Invalid __global__ read of size 4 bytes"]
    assert verdicts["gives wrong values"] == Verdict("gives wrong values", wrong="AssertionError: 3 differ")
    assert verdicts["aborts"].wrong.startswith("it ended with status")


def test_one_that_hangs_is_killed(checker: Checker) -> None:
    verdicts = {verdict.name: verdict for verdict in checker.run(["fine", "hangs", "fine too"])}
    assert verdicts["hangs"].wrong == "killed: no answer for 4 s"
    assert verdicts["fine"].clean and verdicts["fine too"].clean and len(verdicts) == 3


def test_a_child_that_never_begins_is_an_error_for_each(tmp_path: Path) -> None:
    verdicts = Checker((), "cuda", 30.0, tmp_path, "no_such_module").run(["a", "b"])
    named = [verdict for verdict in verdicts if verdict.name in "ab"]
    assert [verdict.name for verdict in named] == ["a", "b"]
    assert all("No module named no_such_module" in verdict.wrong for verdict in named)


def test_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memcheck.json"
    where = {"device": "a GPU", "tool": "compute-sanitizer 1"}
    assert memcheck.report([Verdict("a"), Verdict("b")], {"c": "needs 34 GB of GPU memory"}, where, 0.0, out) == 0
    record = json.loads(out.read_text())
    assert (record["variants"], record["errors"], record["wrong"], record["found"]) == (2, 0, 0, {})
    assert record["not_run"] == {"c": "needs 34 GB of GPU memory"} and record["device"] == "a GPU"
    assert (
        memcheck.report(
            [Verdict("a", ["Invalid read", "Invalid write"]), Verdict("b", wrong="3 differ")], {}, where, 0.0, out
        )
        == 1
    )
    record = json.loads(out.read_text())
    assert (record["variants"], record["errors"], record["wrong"]) == (2, 2, 1)
    assert record["found"] == {"a": ["Invalid read", "Invalid write", ""], "b": ["3 differ"]}
    assert "ERROR a - Invalid read; Invalid write" in capsys.readouterr().out
    assert memcheck.report([], {}, where, 0.0, out) == 1


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memcheck, "machine", lambda: (0.0, 0, {}))
    assert memcheck.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(memcheck, "machine", lambda: (80.0, 1, {}))
    monkeypatch.setattr(memcheck, "sanitizer", lambda: ("", ""))
    assert memcheck.main([]) == 2
    assert "needs compute-sanitizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memcheck.arguments(["--only", "gather"])
