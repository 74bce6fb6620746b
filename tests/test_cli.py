"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from kvgather import cli
from kvgather.bench import report, runner
from kvgather.lab import crash
from kvgather.lab.crash import Outcome

ROOT = Path(__file__).parents[1]


def outcomes(*kinds: str):
    names = ["before/guarded/cpu", "after/guarded/cpu"]
    found = [Outcome(name, kind, message="why") for name, kind in zip(names, kinds, strict=False)]
    return lambda cases, timeout: iter(found)


def test_doctor(capsys):
    assert cli.main(["doctor"]) == cli.OK
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "Triton kernels" in printed


@pytest.mark.parametrize(
    ("kinds", "status", "last"),
    [
        (("segfault", "ok"), cli.OK, "all 2 outcomes are as expected"),
        (("ok", "ok"), cli.NOT_AS_EXPECTED, "after/guarded/cpu   ok"),
        (("segfault", "segfault"), cli.NOT_AS_EXPECTED, "after/guarded/cpu   segfault (exit None)  <- expected: ok"),
        (("segfault", "timeout"), cli.FAILED, "after/guarded/cpu   timeout: why  <- expected: ok"),
        (("segfault", "failed"), cli.FAILED, "after/guarded/cpu   failed: why  <- expected: ok"),
    ],
)
def test_crash_compares_with_what_is_expected(monkeypatch, capsys, kinds, status, last):
    monkeypatch.setattr(crash, "run_all", outcomes(*kinds))
    arguments = ["crash", "--case", "before/guarded/cpu", "--case", "after/guarded/cpu"]
    assert cli.main(arguments) == status
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_crash_writes_what_recorded_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(crash, "run_all", outcomes("segfault", "ok"))
    path = tmp_path / "out.json"
    assert cli.main(["crash", "--device", "cpu", "--json", str(path)]) == cli.OK
    assert list(crash.recorded(path)) == ["before/guarded/cpu", "after/guarded/cpu"]


def test_crash_that_cannot_write_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(crash, "run_all", outcomes("segfault", "ok"))
    assert cli.main(["crash", "--json", str(tmp_path / "no" / "out.json")]) == cli.FAILED
    assert capsys.readouterr().err.startswith("kvgather: ")


class Measured:
    """A benchmark that takes no time."""

    @staticmethod
    def run(device, *, only, seconds, progress):
        progress("[1/1] a case")
        where = runner.machine.__wrapped__(device.type)
        return [report.Row("steps", f"a{only}", "kvgather", 1, 2, 3, 5, 10, 1, 1, 0, 0, **where)]


def test_bench_keeps_rows_where_they_belong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "_line", lambda *command: "")  # no git here
    monkeypatch.delenv(runner.COMMIT, raising=False)
    monkeypatch.setitem(sys.modules, "kvgather.bench.steps", Measured)
    monkeypatch.chdir(tmp_path)
    bench = ["bench", "steps", "--device", "cpu"]
    assert cli.main(bench) == cli.OK
    assert "kvgather" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(runner.COMMIT, "abc1234")
    assert cli.main([*bench, "--csv"]) == cli.OK
    assert cli.main([*bench, "--case", "b", "--csv", "own.csv", "--commit", "fed4321"]) == cli.OK
    assert capsys.readouterr().err == "[1/1] a case\n" * 2
    found = [report.read(tmp_path / name)[0] for name in ("benchmarks/results/steps_cpu.csv", "own.csv")]
    assert [(row.case, row.commit) for row in found] == [("a", "abc1234"), ("ab", "fed4321")]


def test_every_benchmark_has_its_module():
    for what in cli.BENCHMARKS:
        assert callable(importlib.import_module(f"kvgather.bench.{what}").run)


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(cases, timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(crash, "run_all", interrupted)
    assert cli.main(["crash"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "kvgather: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "kvgather: the following arguments are required: COMMAND"),
        (["fly"], "kvgather: argument COMMAND: invalid choice: 'fly'"),
        (["crash", "--timeout", "0"], "kvgather crash: argument --timeout: 0 is not a time; accepted: seconds above 0"),
        (["crash", "--device", "tpu"], "kvgather crash: argument --device: invalid choice: 'tpu'"),
        (["crash", "--case", "x"], "kvgather: --case is 'x'; accepted: before/guarded/cpu"),
        (["crash", "--device", "cuda"], "kvgather: device is 'cuda', and torch sees no GPU here"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(crash, "has_gpu", lambda: False)
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == cli.USAGE
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kvgather", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "doctor" in done.stdout
    assert "crash" in done.stdout
