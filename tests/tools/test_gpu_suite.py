"""The runner of the GPU tests: every way in which a test or its process can end, and what the record says of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gpu_processes
import gpu_suite
import pytest
from gpu_processes import End, Running, Shard, candidates, collect, cut, run_shards

ROOT = Path(__file__).parents[2]
BODIES = {
    "passes": "pass",
    "fails": "assert 1 == 2, 'one is not two'",
    "skips": "pytest.skip('needs two of them')",
    "aborts": "os.abort()",
    "exits": "os._exit(0)",
    "hangs": "time.sleep(600)",
    "leaves": "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)",
    "dies": "kill_the_context(); assert 0, 'this test did it'",
    "errors": "pass",
    "xfails": "assert 0",
}
FILE = """
import os, subprocess, sys, time
import pytest

pytestmark = pytest.mark.gpu

def kill_the_context():
    import torch
    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

@pytest.fixture
def fixture():
    assert {fixture}, "the fixture is broken"

def test_before(): pass

{mark}
@pytest.mark.parametrize("name", ["a b", "c[d]-1"])
def test_it(name, fixture):
    {body}

def test_after(): pass
"""
ITS, OF_ALL = ("test_it[a b]", "test_it[c[d]-1]"), ("test_before", "test_it[a b]", "test_it[c[d]-1]", "test_after")


@dataclass(frozen=True)
class Ran:
    """What a run printed, its status, and its record and log."""

    status: int
    output: str
    record: dict
    log: str


def planted(folder: Path) -> Path:
    """A project with a test file for each of `BODIES`, one that cannot be imported, and one with no GPU test."""
    tests = folder / "tests"
    tests.mkdir(parents=True)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\nxfail_strict = true\n")
    for name, body in BODIES.items():
        mark = "@pytest.mark.xfail(reason='known')" if name == "xfails" else ""
        (tests / f"test_{name}.py").write_text(FILE.format(body=body, fixture=name != "errors", mark=mark))
    (tests / "test_broken.py").write_text("import no_such_module  # pytest.mark.gpu\n")
    (tests / "test_no_gpu.py").write_text("def test_it(): assert 0\n")
    (tests / "test_mixed.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_gpu(): pass\ndef test_cpu(): assert 0\n"
    )
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = planted(tmp_path_factory.mktemp("project"))
    out, log = root / "out" / "record.json", root / "log"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_suite.py"), "--root", str(root), "--out", str(out), "--log",
         str(log), "--limit", "12", "--workers", "4"],
        env=os.environ | {"KVGATHER_COMMIT": "abc1234"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, json.loads(out.read_text()), log.read_text())


def lines_of(ran: Ran, name: str) -> dict[str, str]:
    """Of a planted file's tests that did not pass: "FAILED" or "ERROR", and the reason."""
    found = {}
    for line in ran.output.splitlines():
        for word in ("FAILED", "ERROR"):
            start = f"{word} tests/test_{name}.py::"
            if line.startswith(start):
                test, _, reason = line.removeprefix(start).partition(" - ")
                found[test] = f"{word} {reason}"
    return found


def test_the_record_and_the_last_line_count_everything(ran: Ran) -> None:
    expected = {
        "passed": 4 + 2 + 2 + 2 + 2 + 5 + 1,  # passes, fails, skips, xfails, errors; before a process ended; mixed
        "failed": 2 + 1,  # fails; dies
        "errors": 4 * 3 + 2 + 2 + 1,  # aborts, exits, hangs, leaves; dies; errors; the file that cannot be imported
        "skipped": 2 + 2,  # skips, xfails
    }
    assert {name: ran.record[name] for name in expected} == expected
    assert ran.output.splitlines()[-1].startswith("3 failed, 18 passed, 4 skipped, 17 errors in ")
    assert ran.status == 1


def test_the_record_says_where_and_why(ran: Ran) -> None:
    import torch

    assert ran.record["skips"] == {"needs two of them": 2, "expected to fail: known": 2}
    assert ran.record["torch"] == torch.__version__
    assert ran.record["commit"] == "abc1234" and ran.record["device"] and ran.record["date"]
    assert ran.record["seconds"] > 12 and {"driver", "triton"} <= set(ran.record)
    assert ran.record["files"]["tests/test_mixed.py"]["tests"] == 1
    assert set(ran.record["files"]) == {f"tests/test_{name}.py" for name in (*BODIES, "mixed")}


def test_a_failure_is_named_with_its_reason(ran: Ran) -> None:
    assert list(lines_of(ran, "fails")) == list(ITS)
    assert lines_of(ran, "fails")["test_it[a b]"].startswith("FAILED AssertionError: one is not two")
    assert all(line.startswith("ERROR AssertionError: the fixture") for line in lines_of(ran, "errors").values())
    for name in ("passes", "skips", "xfails", "mixed"):
        assert lines_of(ran, name) == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("aborts", "the process died of SIGABRT"),
        ("exits", "the process ended with status 0"),
        ("hangs", "killed: no test began or ended for 12 s,"),
        ("leaves", "killed: no test began or ended for 12 s,"),
    ],
)
def test_what_a_process_leaves_undone_is_an_error(ran: Ran, name: str, reason: str) -> None:
    assert lines_of(ran, name) == {
        "test_it[a b]": f"ERROR {reason} in this test",
        "test_it[c[d]-1]": f"ERROR {reason} before this test",
        "test_after": f"ERROR {reason} before this test",
    }


def test_a_dead_context_ends_its_process_and_blames_one_test(ran: Ran) -> None:
    told = lines_of(ran, "dies")
    assert told.pop("test_it[a b]").startswith("FAILED AssertionError: this test did it")
    reason = "ERROR the CUDA context died in tests/test_dies.py::test_it[a b]: CUDA error: device-side assert triggered"
    assert told == {"test_it[c[d]-1]": reason, "test_after": reason}


def test_a_file_that_cannot_be_imported_is_one_error(ran: Ran) -> None:
    assert "ERROR tests/test_broken.py - " in ran.output and "No module named 'no_such_module'" in ran.output


def test_a_line_for_each_file_as_it_ends(ran: Ran) -> None:
    lines = ran.output.splitlines()
    assert any(line.startswith("tests/test_passes.py: 4 passed in ") for line in lines)
    assert any(line.startswith("tests/test_aborts.py: 1 passed, 3 errors in ") for line in lines)
    assert any(line.startswith("41 tests of 11 files in 11 processes, 4 at a time, on ") for line in lines)
    assert "s passed tests/test_passes.py::test_it[c[d]-1]" in ran.log
    assert "Fatal Python error: Aborted" in ran.log


def test_no_half_of_a_record_is_left(ran: Ran, tmp_path: Path) -> None:
    gpu_suite.write({"passed": 1}, tmp_path / "new" / "record.json")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["record.json"]


def test_the_time_for_all_is_kept(tmp_path: Path) -> None:
    planted(tmp_path)
    ends: list[End] = []
    shards = [Shard(f"tests/test_{name}.py", (f"tests/test_{name}.py::test_it[a b]",)) for name in ("hangs", "passes")]
    work = tmp_path / "work"
    work.mkdir()
    run_shards(
        tmp_path, shards, work, workers=1, gigabytes=99, limit=60, until=time.monotonic() + 2,
        ended=lambda shard, found, seconds, folder: ends.extend(found),
    )  # fmt: skip
    assert [(end.outcome, end.reason.split(",")[0]) for end in ends] == [
        ("errors", "not begun: the suite's time was over"),
        ("errors", "killed: the suite's time was over"),
    ]


ELSEWHERE = """
import os, subprocess, sys, time
from pathlib import Path
import pytest

@pytest.mark.gpu
def test_it():
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep, start_new_session=True)
    Path("child").write_text(str(child.pid))
    try:
        child.wait()
    finally:
        child.kill()
"""


@pytest.mark.parametrize("how", ["it is quiet for too long", "the suite is interrupted"])
def test_a_killed_test_ends_what_it_has_started_in_another_session(how: str, tmp_path: Path) -> None:
    """As the ranks of tests/parallel."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    (tmp_path / "test_elsewhere.py").write_text(ELSEWHERE)
    work = tmp_path / "work"
    work.mkdir()
    shard, ends = Shard("test_elsewhere.py", ("test_elsewhere.py::test_it",)), []

    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(6 if how == "the suite is interrupted" else 0)
    try:
        with pytest.raises(KeyboardInterrupt) if "interrupted" in how else contextlib.nullcontext():
            run_shards(
                tmp_path, [shard], work, workers=1, gigabytes=99, limit=6, until=time.monotonic() + 60,
                ended=lambda shard, found, seconds, folder: ends.extend(found),
            )  # fmt: skip
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < until, "its child still runs"
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_more_gpu_memory_than_there_is_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a shard that needs more than there is runs alone."""
    planted(tmp_path)
    together: list[int] = []
    begin = gpu_processes.start

    def counted(root: Path, shard: Shard, folder: Path, cache: Path) -> Running:
        made = begin(root, shard, folder, cache)
        alive.append(made)
        together.append(sum(one.shard.gigabytes for one in alive if one.process.poll() is None))
        return made

    alive: list[Running] = []
    monkeypatch.setattr(gpu_processes, "start", counted)
    monkeypatch.setattr(gpu_processes, "GIGABYTES", {"tests/test_passes.py": 40})
    ends: list[End] = []
    shards = [Shard(f"tests/test_{name}.py", (f"tests/test_{name}.py::test_before",)) for name in BODIES][:4]
    work = tmp_path / "work"
    work.mkdir()
    run_shards(
        tmp_path, shards, work, workers=4, gigabytes=6, limit=60, until=time.monotonic() + 60,
        ended=lambda shard, found, seconds, folder: ends.extend(found),
    )  # fmt: skip
    assert len(ends) == 4 and {end.outcome for end in ends} == {"passed"}
    assert max(amount for amount in together if amount < 40) <= 6 and together.count(40) == 1 and max(together) == 40


def test_shards_hold_each_test_once_and_are_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_processes, "SECONDS_A_TEST", {"slow.py": 10.0})
    ids = [f"slow.py::test[{n}]" for n in range(50)]
    shards = cut("slow.py", ids)
    assert len(shards) == round(500 / gpu_processes.SHARD_SECONDS) and shards == cut("slow.py", ids)
    assert sorted(test for shard in shards for test in shard.ids) == sorted(ids)
    assert [shard.name for shard in shards[:1]] == [f"slow.py 1/{len(shards)}"]
    assert cut("slow.py", ids[:1]) == [Shard("slow.py", (ids[0],))]
    assert len(cut("quick.py", ids[:20])) == 1


def test_the_longest_are_begun_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planted(tmp_path)
    monkeypatch.setattr(gpu_processes, "SECONDS_A_TEST", {"tests/test_skips.py": 9.0, "tests/test_fails.py": 5.0})
    order: list[str] = []
    shards = [
        Shard(f"tests/test_{name}.py", (f"tests/test_{name}.py::test_before",)) for name in ("passes", "fails", "skips")
    ]
    work = tmp_path / "work"
    work.mkdir()
    run_shards(
        tmp_path, shards, work, workers=1, gigabytes=99, limit=60, until=time.monotonic() + 60,
        ended=lambda shard, found, seconds, folder: order.append(shard.file),
    )  # fmt: skip
    assert order == ["tests/test_skips.py", "tests/test_fails.py", "tests/test_passes.py"]


def test_every_gpu_test_is_in_a_file_that_is_looked_into(tmp_path: Path) -> None:
    """The words that are looked for say so; a GPU machine may lack what other files import."""
    files = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("test_*.py"))
    tests, broken = collect(ROOT, files, tmp_path, 120)
    assert not broken
    assert sum(map(len, tests.values())) > 850
    assert set(tests) <= set(candidates(ROOT, ["tests"]))
    assert set(gpu_processes.SECONDS_A_TEST) | set(gpu_processes.GIGABYTES) <= set(tests), "a file was renamed"


def test_without_a_gpu_the_record_is_not_touched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "machine", lambda: (0.0, 0, {}))
    assert gpu_suite.main([]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert gpu_suite.arguments(["tests/lab"]).out is None
    assert gpu_suite.arguments([]).out == gpu_suite.RECORD
