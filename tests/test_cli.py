"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import errno
import importlib
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvgather import cli, files
from kvgather.bench import machine, report
from kvgather.cli import version
from kvgather.cli.bench import BENCHMARKS
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


def test_crash_that_cannot_write_fails_before_the_cases_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(crash, "run_all", lambda cases, timeout: pytest.fail("a case ran"))
    for path in (tmp_path / "no" / "out.json", tmp_path):
        assert cli.main(["crash", "--json", str(path)]) == cli.FAILED
        assert capsys.readouterr().err.startswith("kvgather: ")
    assert list(tmp_path.iterdir()) == []


def test_crash_writes_json_alone_to_the_standard_output(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(crash, "run_all", outcomes("segfault", "ok"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["crash", "--device", "cpu", "--json", "-"]) == cli.OK
    printed = capsys.readouterr()
    assert [o["kind"] for o in json.loads(printed.out)["outcomes"]] == ["segfault", "ok"]
    assert printed.err.splitlines()[-1] == "all 2 outcomes are as expected"
    assert list(tmp_path.iterdir()) == []


def test_crash_lists_its_cases(monkeypatch, capsys):
    monkeypatch.setattr(crash, "run_all", lambda cases, timeout: pytest.fail("a case ran"))
    assert cli.main(["crash", "--list"]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(crash.CASES)
    wanted = "before/unguarded/cuda expected: silent corruption or illegal access or abort"
    assert wanted in [" ".join(line.split()) for line in lines]
    assert cli.main(["crash", "--list", "--device", "cpu"]) == cli.OK
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_bench_prints_and_keeps_rows_as_they_come(monkeypatch, cases, tmp_path, capsys):
    seen = []
    write = report.write
    monkeypatch.setattr(report, "write", lambda rows, path: (write(rows, path), seen.append(len(report.read(path)))))
    assert cli.main([*cases, "--csv", "own.csv"]) == cli.OK
    assert seen == [1, 2, 3]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in ("a", "b", "c")] == ["a", "b", "c"]
    assert sum("median" in line for line in printed) == 3, "a table for each case"
    assert printed[-3:] == ["in all: good", "", "3 rows in own.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["own.csv"]


def test_bench_that_is_interrupted_keeps_what_it_has(cases, monkeypatch, capsys):
    monkeypatch.setattr(Cases, "error", KeyboardInterrupt())
    assert cli.main([*cases, "--csv", "own.csv"]) == cli.INTERRUPTED
    printed = capsys.readouterr()
    assert printed.out.endswith("3 rows in own.csv\n") and printed.err.endswith("kvgather: interrupted\n")
    assert [row.case for row in report.read(Path("own.csv"))] == ["a", "b", "c"]


def test_bench_whose_rows_are_wrong(cases, monkeypatch, capsys):
    monkeypatch.setattr(Cases, "error", ArithmeticError("x is not the reference on c"))
    assert cli.main(cases) == cli.NOT_AS_EXPECTED
    assert capsys.readouterr().err.endswith("kvgather: x is not the reference on c\n")


def test_bench_on_a_full_disk_loses_nothing(cases, monkeypatch, capsys):
    older = Path("own.csv")
    assert cli.main([*cases, "--csv", "own.csv"]) == cli.OK
    before = older.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    replace = files.os.replace

    def refused(*arguments):
        raise full

    monkeypatch.setattr(files.os, "replace", refused)
    capsys.readouterr()
    assert cli.main([*cases, "--csv", "own.csv"]) == cli.FAILED
    printed = capsys.readouterr()
    assert printed.err.count("rows are not kept yet: [Errno 28] No space left on device") == 1
    assert printed.err.endswith("kvgather: [Errno 28] No space left on device\n")
    assert printed.out.endswith(before.decode() + "\n")
    assert older.read_bytes() == before and list(Path().iterdir()) == [older]
    attempts = iter([refused, refused, refused, replace])  # there is room again in the end
    monkeypatch.setattr(files.os, "replace", lambda *arguments: next(attempts)(*arguments))
    assert cli.main([*cases, "--csv", "new.csv"]) == cli.OK
    assert len(report.read(Path("new.csv"))) == 3


def test_bench_writes_csv_alone_to_the_standard_output(cases, tmp_path, capsys):
    assert cli.main([*cases, "--csv", "-"]) == cli.OK
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("benchmark,case,") and printed.out.count("\n") == 4
    assert "in all: good" in printed.err and list(tmp_path.iterdir()) == []


def test_bench_that_cannot_keep_rows_fails_before_it_measures(cases, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Cases, "run", lambda *_, **__: pytest.fail("a case ran"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for path, status in (("file/x.csv", cli.FAILED), (".", cli.FAILED), ("other.csv", cli.USAGE)):
        assert cli.main([*cases, "--csv", path]) == status
        assert capsys.readouterr().err.startswith("kvgather: ")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a shell")
@pytest.mark.parametrize("arguments", ["--help", "doctor", "crash --list", "bench --help"])
def test_a_reader_that_has_enough_is_no_error(arguments):
    shell = f"{shlex.quote(sys.executable)} -m kvgather {arguments} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_standard_output_that_is_full_is_said():
    command = [sys.executable, "-m", "kvgather", "crash", "--list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (cli.FAILED, "kvgather: [Errno 28] No space left on device\n")


def test_the_version(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert capsys.readouterr().out == f"kvgather {project['version']}\n"
    monkeypatch.setattr(version, "__file__", "/somewhere/kvgather/cli/version.py")  # an installed copy
    assert version.version() == project["version"]


class Measured:
    """A benchmark that takes no time."""

    @staticmethod
    def run(device, *, only, seconds, progress, keep):
        assert [case.name for case in progress([SimpleNamespace(name="a case")])] == ["a case"]
        where = machine.machine(device.type)
        rows = [report.Row("steps", f"a{only}", "kvgather", 1, 2, 3, 5, 10, 1, 1, 0, 0, **where)]
        keep(rows)
        return rows


class Cases:
    """A benchmark of three cases, at the end of which something happens."""

    error: BaseException | None = None

    @classmethod
    def run(cls, device, *, only, seconds, progress, keep):
        rows = []
        for case in progress([SimpleNamespace(name=name) for name in "abc"]):
            rows.append(
                report.Row("steps", case.name, "kvgather", 1, 2, 3, 5, 10, 1, 1, 0, 0, "CPU", "", "2", "", "", "")
            )
            keep(rows[-1:])
        if cls.error is not None:
            raise cls.error
        return rows

    @staticmethod
    def summary(rows):
        return "in all: good"


@pytest.fixture
def cases(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kvgather.bench.steps", Cases)
    monkeypatch.setattr(Cases, "error", None)
    monkeypatch.chdir(tmp_path)
    return ["bench", "steps", "--device", "cpu"]


def test_bench_keeps_rows_where_they_belong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "_line", lambda *command: "")  # no git here
    monkeypatch.delenv(machine.COMMIT, raising=False)
    monkeypatch.setitem(sys.modules, "kvgather.bench.steps", Measured)
    monkeypatch.chdir(tmp_path)
    bench = ["bench", "steps", "--device", "cpu"]
    assert cli.main(bench) == cli.OK
    assert "kvgather" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(machine.COMMIT, "abc1234")
    assert cli.main([*bench, "--csv"]) == cli.OK
    assert cli.main([*bench, "--case", "b", "--csv", "own.csv", "--commit", "fed4321"]) == cli.OK
    assert capsys.readouterr().err == "[1/1] a case\n" * 2
    found = [report.read(tmp_path / name)[0] for name in ("benchmarks/results/steps_cpu.csv", "own.csv")]
    assert [(row.case, row.commit) for row in found] == [("a", "abc1234"), ("ab", "fed4321")]


def test_every_benchmark_has_its_module():
    for what in BENCHMARKS:
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
        (
            ["crash", "--timeout", "1e9"],
            "kvgather crash: argument --timeout: 1e9 is not a time; accepted: seconds",
        ),
        (
            ["crash", "--timeout", "nan"],
            "kvgather crash: argument --timeout: nan is not a time; accepted: seconds",
        ),
        (
            ["crash", "--timeout", "two"],
            "kvgather crash: argument --timeout: two is not a time; accepted: seconds",
        ),
        (
            ["bench", "steps", "--seconds", "inf"],
            "kvgather bench: argument --seconds: inf is not a time; accepted: se",
        ),
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


@pytest.mark.parametrize("module", ["kvgather", "kvgather.cli"])
def test_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "doctor" in done.stdout
    assert "crash" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["replay", "--help"], ["--version"]])
def test_help_loads_no_command(arguments):
    """Above what `import kvgather` loads: the parsers, and the folder of results, which a help text names."""
    code = (
        "import sys, kvgather\nbefore = set(sys.modules)\nfrom kvgather import cli\n"
        f"try:\n    cli.main({arguments})\nexcept SystemExit:\n    print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    parsers = ("kvgather.cli", "kvgather.replay.arguments", "kvgather.replay.commands", "kvgather.bench.results")
    assert "kvgather.cli.entry" in loaded
    packages = {"kvgather.replay", "kvgather.bench"}
    ours = [name for name in loaded if name.startswith("kvgather") and not name.startswith(parsers)]
    assert set(ours) <= packages
    roots = {name.partition(".")[0] for name in loaded}
    assert not roots & {"IPython", "matplotlib", "openai", "tqdm", "transformers"}
