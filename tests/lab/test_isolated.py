"""Functions, scripts and source text in child processes: the outcome of every way to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kvgather.lab import outcome
from kvgather.lab.child import environment
from kvgather.lab.isolated import run_code, run_function, run_script
from kvgather.lab.script import ScriptError

pytestmark = pytest.mark.triton
try:
    from tests.lab import crashing
except ImportError:  # without triton
    crashing: Any = None  # type: ignore[no-redef]

SCRIPT = Path(__file__).with_name("crashing.py")
LOAD = "x = tl.load(x_ptr + i)  # no mask"
needs_mprotect = pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="processes end by signals")


def line_of(text: str) -> int:
    return 1 + next(i for i, line in enumerate(SCRIPT.read_text().splitlines()) if text in line)


@needs_mprotect
def test_a_kernel_that_reads_behind_a_fence_dies_at_its_line() -> None:
    found = run_function(crashing.read_behind, 5)
    assert (found.kind, found.exit_code, found.case) == ("segfault", -11, "read_behind")
    assert (found.file, found.line, found.source) == (str(SCRIPT), line_of(LOAD), LOAD)
    assert str(found) == f"segfault (exit -11) at {SCRIPT}:{line_of(LOAD)}"
    inside = run_function(crashing.read_behind, 8, name="all 8")
    assert (inside.kind, inside.exit_code, inside.case) == ("ok", 0, "all 8")
    assert inside.output == "n is 8\nsum 16\n"
    assert inside.triton and inside.python and inside.date


@needs_signals
@pytest.mark.parametrize(
    ("name", "arguments", "kind", "code", "message"),
    [
        ("touch_nothing", (), "segfault", -11, ""),
        ("abort", (), "abort", -6, ""),
        ("complain", ("é: too large",), "failed", 1, "ArithmeticError: é: too large"),
        ("leave", (3,), "failed", 3, "exit 3 with no output"),
        ("leave", (0,), "ok", 0, ""),
        ("interrupt", (), "failed", -2, "KeyboardInterrupt"),
    ],
)
def test_every_end_of_a_function(name, arguments, kind, code, message) -> None:
    found = run_function(getattr(crashing, name), *arguments)
    assert (found.kind, found.exit_code, found.message) == (kind, code, message)
    if kind in ("segfault", "abort"):
        wanted = {"touch_nothing": "ctypes.string_at(0)", "abort": "os.abort()"}[name]
        assert (found.file, found.source) == (str(SCRIPT), wanted)


def test_a_child_that_hangs_is_killed_although_its_own_child_keeps_the_output_open() -> None:
    started = time.monotonic()
    found = run_function(crashing.hang_with_a_child, timeout=8)
    assert (found.kind, found.exit_code, str(found)) == ("timeout", None, "timeout: no answer in 8 s")
    assert found.output in ("waiting\n", "")  # it may still be importing
    assert time.monotonic() - started < 15


def test_arguments_are_copied_and_what_is_printed_has_no_meaning() -> None:
    found = run_function(crashing.add, torch.arange(3), 0.5)
    assert (found.kind, found.output) == ("ok", "[0.5, 1.5, 2.5] {'a': 1}\n")
    assert run_code("print({'a': 1})\nprint('{')").output == "{'a': 1}\n{\n"


@needs_mprotect
def test_a_script_in_a_folder_with_a_space_and_an_accent(tmp_path: Path) -> None:
    folder = tmp_path / "mes essais é 😀"
    folder.mkdir()
    script = shutil.copy(SCRIPT, folder / "two.py")
    found = run_script(script, "read_behind", "6")
    assert (found.kind, found.exit_code, found.case) == ("segfault", -11, "two.py")
    assert (found.file, found.line, found.source) == (str(script), line_of(LOAD), LOAD)
    assert run_script(str(script), "read_behind", "8").output == "['read_behind', '8']\nn is 8\nsum 16\n"


def test_a_script_has_its_own_folder_arguments_and_name(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("value = 5\n")
    script = tmp_path / "s.py"
    script.write_text("import helper, sys\nprint(helper.value, sys.argv[1:], __name__, sys.argv[0] == __file__)\n")
    assert run_script(script, "-x", "a b").output == "5 ['-x', 'a b'] __main__ True\n"


@needs_mprotect
def test_source_text() -> None:
    code = "import ctypes\n\ndef f():\n    ctypes.string_at(0)\n\nf()\n"
    found = run_code(code, name="cell 3")
    assert (found.kind, found.case, found.file, found.line) == ("segfault", "cell 3", "cell 3", 4)
    assert found.source == "ctypes.string_at(0)"


def test_a_function_of_the_main_module(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "from kvgather.lab.isolated import run_function\n"
        "def f(n):\n    print('called with', n)\n"
        "if __name__ == '__main__':\n    o = run_function(f, 3)\n    print(o.kind, o.output, end='')\n"
    )
    for options in ([str(script)], ["-m", "main"]):
        done = subprocess.run(
            [sys.executable, *options], capture_output=True, text=True, cwd=tmp_path, env=environment()
        )
        assert done.stdout == "ok called with 3\n", done.stderr


def test_what_a_child_cannot_import_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"cannot be given .*<lambda>\(\) with these arguments .*; accepted: a function"
    ):
        run_function(lambda: None)
    with pytest.raises(TypeError, match="with these arguments"):
        run_function(crashing.complain, (i for i in range(3)))
    with pytest.raises(TypeError, match="function is int; accepted: a function"):
        run_function(7)  # type: ignore[arg-type]
    prompt = "from kvgather.lab.isolated import run_function\ndef f(): pass\nrun_function(f)\n"
    done = subprocess.run([sys.executable, "-c", prompt], capture_output=True, text=True, env=environment())
    assert "f() is from a notebook or a prompt, where a child process cannot import it" in done.stderr


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: run_script("missing.py"), ScriptError, "script is 'missing.py', which is missing; accepted: the path"),
        (lambda: run_script("."), ScriptError, "script is '.', which is a folder; accepted: the path"),
        (lambda: run_script(3), TypeError, "script is int; accepted: the path"),
        (lambda: run_script(SCRIPT, 3), TypeError, "arguments have a int; accepted: strings"),
        (lambda: run_code(3), TypeError, "code is int; accepted: a string"),
        (lambda: run_code("", device="tpu"), ValueError, "device is 'tpu'; accepted: 'cpu', 'cuda'"),
        (lambda: run_code("", timeout=0), ValueError, "timeout is 0"),
    ],
)
def test_wrong_arguments(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@needs_signals
def test_an_interrupted_caller_leaves_no_child(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from kvgather.lab.isolated import run_code\n"
        "child = 'import os, sys, time; open(sys.argv[1], \"w\").write(str(os.getpid())); time.sleep(60)'\n"
        "run_code(child, sys.argv[1])\n"
    )
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(pid_file)], env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGINT)
    _, stderr = parent.communicate(timeout=20)
    assert parent.returncode != 0 and stderr.rstrip().endswith("KeyboardInterrupt")
    assert not psutil.pid_exists(int(pid_file.read_text()))


def test_the_json_of_an_outcome_has_output_only_where_there_is_some() -> None:
    texts = [json.loads(outcome.as_json([outcome.Outcome("a", "ok", output=output)])) for output in ("", "x")]
    assert ["output" in text["outcomes"][0] for text in texts] == [False, True]
