"""Crash cases: the outcomes of real children on a CPU, and of children that end in every other way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from kvgather.lab import before_fix, crash, faults
from kvgather.lab.child import GRACE, ROOT, Ended, environment
from kvgather.lab.crash import CASES, CrashError, Outcome

pytestmark = pytest.mark.triton
LOAD = "k_scale = tl.load(k_scale_ptr + scale_at)"
LIVE = ["before/guarded/cpu", "before/unguarded/cpu", "shipped-fix/per-head/guarded/cpu", "after/guarded/cpu"]


@pytest.fixture(scope="module")
def live():
    if sys.platform == "win32":
        pytest.skip("a fence on a CPU needs mprotect")
    return {outcome.case: outcome for outcome in crash.run_all(LIVE)}


def test_every_cpu_outcome_is_as_expected(live):
    assert list(live) == LIVE
    assert [outcome.as_expected for outcome in live.values()] == [True] * len(LIVE), live


@pytest.mark.parametrize("name", ["before/guarded/cpu", "shipped-fix/per-head/guarded/cpu"])
def test_a_guarded_scale_stops_the_kernel_at_its_line(live, name):
    outcome = live[name]
    assert (outcome.kind, outcome.exit_code) == ("segfault", -11)
    assert outcome.file == "kvgather/lab/before_fix.py"
    assert outcome.source == LOAD
    assert Path(before_fix.__file__).read_text().splitlines()[outcome.line - 1].strip() == outcome.source
    assert str(outcome) == f"segfault (exit -11) at {outcome.file}:{outcome.line}"


def test_an_unguarded_scale_gives_reproducible_silent_corruption(live):
    outcome = live["before/unguarded/cpu"]
    assert (outcome.kind, outcome.exit_code) == ("silent corruption", 0)
    # The arena's element i holds i, so sequence 0 used scales of at least 20 * 2 * 16 = 640 instead of 0.5.
    assert 640 / 0.5 - 1 < outcome.relative_error < (31 * 2 + 1) * 16 / 0.5 + 32


def test_an_outcome_contains_device_versions_and_date(live):
    outcome = live["after/guarded/cpu"]
    assert (outcome.kind, outcome.exit_code, outcome.relative_error) == ("ok", 0, 0.0)
    assert "interpreter" in outcome.device
    assert outcome.torch == torch.__version__
    assert outcome.triton[0].isdigit()
    assert len(outcome.date) == 10


def test_no_core_file_is_left(live):
    assert not list(Path.cwd().glob("core*"))


def test_the_expected_kinds_of_each_case():
    assert len(CASES) == 20
    expected = {name: case.expected for name, case in CASES.items()}
    assert expected["before/guarded/cpu"] == ("segfault",)
    assert expected["before/unguarded/cpu"] == ("silent corruption",)
    assert "illegal access" in expected["before/guarded/cuda"]
    assert "silent corruption" not in expected["before/guarded/cuda"]
    assert {"silent corruption", "illegal access"} <= set(expected["before/unguarded/cuda"])
    assert all(kinds == ("ok",) for name, kinds in expected.items() if name.startswith("after"))
    assert expected["shipped-fix/guarded/cpu"] == ("ok",)
    assert expected["shipped-fix/per-head/guarded/cpu"] == ("segfault",)


def fake_run(code: int, stdout: str = "", stderr: str = "") -> object:
    """A stand-in for `run_module` whose child ends with these results."""
    return lambda *_, **__: Ended(code, stdout, stderr)


NO_OBJECT, NO_KEY = ", which is no JSON object", "; accepted: kind, relative_error, "
ENDINGS = {  # exit code, stdout, stderr; the outcome's kind, and the beginning of its text
    "abort": (-signal.SIGABRT, '{"device": "MI300X"}', "Memory access fault by GPU node-1", "abort", "abort (exit -6)"),
    "killed": (-9, "", "", "failed", "failed: exit -9 with no output"),
    "import error": (1, "", "Traceback\nImportError: no torch\n\n", "failed", "failed: ImportError: no torch"),
    "illegal access": (
        1, '{"kind": "illegal access", "message": "CUDA error: an illegal"}', "", "illegal access", "illegal access"
    ),
    "infinite error": (
        0, '{"kind": "silent corruption", "relative_error": "inf"}', "", "silent corruption",
        "silent corruption, relative error inf",
    ),
    "windows": (0xC0000005, "", "", "segfault", "segfault (exit 3221225477)"),
    "half a line": (0, '{"kind": "o', "", "failed", f'failed: the child printed {{"kind": "o{NO_OBJECT}'),
    "half a line, an error": (1, '{"torch": "2"}\n{"k', "", "failed", f'failed: the child printed {{"k{NO_OBJECT}'),
    "half a line, a signal": (-signal.SIGSEGV, '{"torch": "2"}\n{"k', "", "segfault", "segfault (exit -11)"),
    "a deep line": (0, '{"a":' * 100_000, "", "failed", 'failed: the child printed {"a":{"a":'),
    "a key": (0, '{"speed": 1}', "", "failed", f"failed: the child printed the key 'speed'{NO_KEY}"),
    "another case": (0, '{"case": "x"}', "", "failed", f"failed: the child printed the key 'case'{NO_KEY}"),
    "a kind": (0, '{"kind": "fine"}', "", "failed", "failed: the child printed kind: 'fine'; accepted: ok, silent"),
    "a number": (0, '{"relative_error": "x"}', "", "failed", "failed: the child printed relative_error: 'x'; accepted"),
    "a type": (0, '{"line": [1]}', "", "failed", "failed: the child printed line: [1]; accepted: int"),
    "other lines": (0, "a line of text\n[1]\n7", "", "ok", "ok"),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_outcome_of_each_ending_of_a_child(monkeypatch, ending):
    code, stdout, stderr, kind, text = ENDINGS[ending]
    monkeypatch.setattr(crash, "run_module", fake_run(code, stdout, stderr))
    outcome = crash.run("before/guarded/cpu")
    assert (outcome.case, outcome.kind, outcome.exit_code) == ("before/guarded/cpu", kind, code)
    assert str(outcome).startswith(text)


def test_any_module_can_be_run_in_a_child(monkeypatch):
    outcome = crash.run_child("kvgather.lab.planted", "cu_seqlens_ptr", "before")
    assert (outcome.kind, outcome.exit_code, outcome.case) == ("segfault", -11, "kvgather.lab.planted")
    assert outcome.source == "start = tl.load(cu_seqlens_ptr + i - 1, mask=inside, other=0)"
    monkeypatch.setattr(crash, "run_module", fake_run(0))
    assert crash.run_child("any_module", name="a name").kind == "ok"


def test_a_child_that_hangs_is_killed():
    outcome = crash.run("before/guarded/cpu", timeout=0.2)
    assert (outcome.kind, outcome.exit_code, outcome.as_expected) == ("timeout", None, False)
    assert str(outcome) == "timeout: no answer in 0.2 s"


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9, "2", None, True])
def test_an_invalid_time_limit_is_rejected(timeout):
    with pytest.raises((TypeError, ValueError), match=r"timeout is .*; accepted: "):
        crash.run("before/guarded/cpu", timeout=timeout)


ORPHAN = """
import os, sys
from kvgather.lab import crash
print(os.getpid(), flush=True)
crash.run_child("tests.lab.hanging", sys.argv[1], timeout=2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals")
def test_a_child_whose_parent_was_killed_ends_itself(tmp_path):
    """The child ignores signals and hangs in compiled code, where no Python runs."""
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(pid_file)], env=environment(), stdout=subprocess.PIPE)
    with parent:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.05)
        started = time.monotonic()
        parent.kill()
    while _lives(int(pid_file.read_text())):
        assert time.monotonic() - started < 2 + GRACE + 3
        time.sleep(0.05)


def _lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # a container may lack an init that reaps it
    except psutil.NoSuchProcess:
        return False


def test_a_path_that_is_not_ascii_keeps_the_line(tmp_path):
    """faulthandler prints such a path with escapes."""
    clone = tmp_path / "clöne 克隆 😀"
    clone.mkdir()
    shutil.copytree(ROOT / "kvgather", clone / "kvgather", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from kvgather.lab import crash; o = crash.run('before/guarded/cpu'); print(o.kind, o.file, o.line, o.source)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env | {"PYTHONPATH": str(clone)}, capture_output=True, text=True
    )
    line = Path(before_fix.__file__).read_text(encoding="utf-8").splitlines().index(f"        {LOAD}") + 1
    assert done.stdout.strip() == f"segfault kvgather/lab/before_fix.py {line} {LOAD}", done.stderr


def test_the_source_line_is_the_innermost_frame_of_this_package():
    kernel = faults.as_faulthandler_prints(before_fix.__file__)
    text = "\n".join(
        [
            "Fatal Python error: Segmentation fault",
            "Current thread 0x1 (most recent call first):",
            '  File "/t/triton/runtime/interpreter.py", line 5 in create_masked_load',
            f'  File "{kernel}", line 1 in gather_one_head_kernel',
            f'  File "{kernel}", line 2 in cp_mha_gather_cache',
        ]
    )
    assert faults.source_line(text) == {
        "file": "kvgather/lab/before_fix.py",
        "line": 1,
        "source": Path(before_fix.__file__).read_text().splitlines()[0],
    }
    assert faults.source_line("no traceback") == {}
    starter = f'  File "{ROOT}/kvgather/lab/_time_limit.py", line 31 in main'  # the outermost frame of every child
    assert faults.source_line(starter) == {}


def test_unknown_and_unavailable_cases_are_rejected(monkeypatch):
    monkeypatch.setattr(crash, "has_gpu", lambda: False)
    with pytest.raises(CrashError, match="case is 'x'; accepted: before/guarded/cpu"):
        crash.run("x")
    with pytest.raises(CrashError, match="needs a GPU"):
        crash.run("before/guarded/cuda")
    with pytest.raises(CrashError, match="torch sees no GPU"):
        crash.names("cuda")
    with pytest.raises(CrashError, match="accepted: 'cpu', 'cuda', 'all'"):
        crash.names("tpu")
    assert all(name.endswith("/cpu") for name in crash.names("all"))
    monkeypatch.setattr(crash, "has_gpu", lambda: True)
    assert len(crash.names("all")) == 20
    assert len(crash.names("cuda")) == 10


def test_saved_outcomes_can_be_read(tmp_path):
    path = tmp_path / "crash.json"
    outcomes = [
        Outcome("before/guarded/cuda", "illegal access", 1, message="CUDA error", device="H100", date="2026-01-01"),
        Outcome("before/unguarded/cuda", "silent corruption", 0, float("inf")),
    ]
    assert crash.recorded(path) == {}
    crash.save(outcomes, path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert crash.recorded(path) == {o.case: o for o in outcomes}
    path.write_text('{"outcomes": [{"case": "x"}]}')
    with pytest.raises(CrashError, match="holds no recorded outcomes"):
        crash.recorded(path)


def test_the_committed_outcomes_are_as_expected():
    outcomes = crash.recorded()
    if not outcomes:
        pytest.skip("the repository contains no outcomes of a GPU")
    assert {name for name in CASES if name.endswith("/cuda")} <= set(outcomes)
    assert all(o.as_expected and o.device and o.date and o.torch and o.triton for o in outcomes.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("/cuda")])
def test_the_outcome_on_a_gpu_is_as_expected(name):
    outcome = crash.run(name)
    assert outcome.as_expected, f"{outcome}"
