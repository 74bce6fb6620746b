"""`kvgather trace SCRIPT.py`: what it prints, its exit status, and that the script notices nothing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvgather
from kvgather import cli
from kvgather.device import has_gpu
from kvgather.lab.child import environment

pytestmark = pytest.mark.triton
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
KERNELS = """
import sys, time
import torch, triton
import triton.language as tl

@triton.jit
def scale_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i), mask=i < n)

def scale(x, n=None):
    n = x.numel() if n is None else n
    out = torch.empty(n)
    scale_kernel[(triton.cdiv(n, 8),)](x, out, n, BLOCK=8)
    return out
"""
LOAD_LINE = 1 + KERNELS.splitlines().index("    tl.store(out + i, 2 * tl.load(x + i), mask=i < n)")
FOUND = f"s.py:{LOAD_LINE} in scale_kernel(): load x, elements 5–7 of 5, first program (0,)"
CLEAN = "no access outside its tensor; accesses: 2, launches: 1"


def write(folder: Path, body: str, name: str = "s.py") -> str:
    script = folder / name
    script.write_text(KERNELS + body, encoding="utf-8")
    return str(script)


def run(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Status, stdout and stderr of `python -m kvgather trace` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "kvgather", "trace", *arguments], capture_output=True, encoding="utf-8", cwd=cwd,
        env=environment(PYTHONIOENCODING="utf-8"),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("numel", "status", "report"), [(8, cli.OK, CLEAN), (5, cli.NOT_AS_EXPECTED, FOUND)])
def test_clean_and_found(tmp_path: Path, numel: int, status: int, report: str) -> None:
    script = write(tmp_path, f"print(int(scale(torch.ones({numel})).sum()))\n")
    assert run(script) == (status, f"{2 * numel}\n{report}\n", "")


def test_a_script_with_arguments_a_helper_and_a_path_with_a_space_and_an_accent(tmp_path: Path) -> None:
    folder = tmp_path / "mes essais é"
    folder.mkdir()
    (folder / "trace.py").write_text("word = 'own'\n")  # the name of a module of this package and of Python's
    body = (
        "import os, trace\n"
        "if __name__ == '__main__':\n"
        "    total = int(scale(torch.ones(8)).sum())\n"
        "    print(trace.word, sys.argv[1:], os.path.samefile(sys.argv[0], __file__), total)\n"
    )
    script = write(folder, body, "essai é.py")
    wanted = f"own ['--strict', '--limit', '1', 'a b'] True 16\n{CLEAN}\n"
    assert run("--limit", "3", script, "--strict", "--limit", "1", "a b") == (cli.OK, wanted, "")
    assert run("essai é.py", "--strict", "--limit", "1", "a b", cwd=folder) == (cli.OK, wanted, "")


@pytest.mark.parametrize(
    ("ending", "status", "stderr"),
    [
        ("sys.exit()", cli.NOT_AS_EXPECTED, ""),
        ("sys.exit(0)", cli.NOT_AS_EXPECTED, ""),
        ("sys.exit(7)", cli.FAILED, "the script exited with status 7\n"),
        ("sys.exit('no é here')", cli.FAILED, "no é here\n"),
        ("sys.exit('')", cli.FAILED, "the script exited with status 1\n"),
    ],
)
def test_a_script_that_exits(tmp_path: Path, ending: str, status: int, stderr: str) -> None:
    assert run(write(tmp_path, f"scale(torch.ones(5))\n{ending}\n")) == (status, FOUND + "\n", stderr)


def test_a_traceback_has_only_the_scripts_frames(tmp_path: Path) -> None:
    body = "def f():\n    raise KeyError('é')\n\nscale(torch.ones(5))\nf()\n"
    script = write(tmp_path, body)
    status, stdout, stderr = run(script)
    assert (status, stdout) == (cli.FAILED, FOUND + "\n")
    assert stderr.splitlines()[0] == "Traceback (most recent call last):" and stderr.endswith("KeyError: 'é'\n")
    assert re.findall(r'File "(.+)", line \d+, in (\S+)', stderr) == [(script, "<module>"), (script, "f")]


def test_a_kernel_that_raises_shows_its_line_and_no_frame_of_ours(tmp_path: Path) -> None:
    status, stdout, stderr = run(write(tmp_path, "scale_kernel[(1,)](None, torch.empty(8), 8, BLOCK=8)\n"))
    assert status == cli.FAILED and stdout.startswith("no access outside its tensor; accesses: 0, launches: 1")
    assert f"line {LOAD_LINE}, in scale_kernel" in stderr and "InterpreterError" in stderr
    package = str(Path(kvgather.__file__).parent)
    assert package not in stderr and "runpy" not in stderr


def test_a_script_that_is_no_python(tmp_path: Path) -> None:
    status, _, stderr = run(write(tmp_path, "def f(:\n"))
    assert status == cli.FAILED and "SyntaxError" in stderr and "runpy" not in stderr


def test_a_script_without_a_launch_is_not_called_clean(tmp_path: Path) -> None:
    wanted = "done\ns.py launched no Triton kernel in this process: nothing was checked\n"
    assert run(write(tmp_path, "print('done')\n")) == (cli.USAGE, wanted, "")


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
@pytest.mark.parametrize("call", ["torch.ones(8, device='cuda')", "triton.runtime.driver.active.get_current_target()"])
def test_a_script_that_wants_a_gpu(tmp_path: Path, call: str) -> None:
    status, stdout, stderr = run(write(tmp_path, f"scale({call})\n"))
    assert (status, stdout) == (cli.USAGE, "s.py launched no Triton kernel in this process: nothing was checked\n")
    assert f"scale({call})" in stderr
    wanted = 'kvgather: s.py wants a GPU, and torch sees none here; accepted: tensors on "cpu", where kernels run in'
    assert stderr.splitlines()[-1] == f"{wanted} the interpreter"


def test_options(tmp_path: Path) -> None:
    body = "x = torch.empty(16)\nx[:4] = 1\nscale(x[:15:2], 8)\nscale(torch.ones(3), 4)\n"
    script = write(tmp_path, body)
    status, stdout, _ = run("--unwritten", script)
    found = [line.split("load x, ")[1].split(" first")[0] for line in stdout.splitlines()]
    assert (status, found) == (
        cli.NOT_AS_EXPECTED,
        ["elements 1, 3, 5 and 7 of 15, between the view's elements,", "elements 3–7 of 3,",
         "elements 4–7 of 15, which nothing wrote,"],
    )  # fmt: skip
    _, stdout, _ = run("--no-strict", script)
    assert len(stdout.splitlines()) == 1 and "elements 3–7 of 3" in stdout
    _, stdout, _ = run("--limit", "1", script)
    assert stdout.splitlines()[1] == "and 1 more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "kvgather: script is 'missing.py', which is missing; accepted: the path of a Python file"),
        (["."], "kvgather: script is '.', which is a folder; accepted: the path of a Python file"),
        (["--limit", "0", "x.py"], "kvgather trace: argument --limit: 0 is not a number of lines; accepted: 1 or more"),
        ([], "kvgather trace: the following arguments are required: SCRIPT.py"),
    ],
)
def test_wrong_usage(tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["trace", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == cli.USAGE
    assert capsys.readouterr().err.startswith(message)


def test_argv_path_and_main_are_restored(tmp_path: Path, capsys) -> None:
    script = write(tmp_path, "scale(torch.ones(8))\n")
    before = (list(sys.argv), list(sys.path), sys.modules["__main__"])
    assert cli.main(["trace", script, "x"]) == cli.OK
    assert (list(sys.argv), list(sys.path), sys.modules["__main__"]) == before
    assert capsys.readouterr().out == CLEAN + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is a signal")
def test_an_interrupted_script_prints_what_was_found(tmp_path: Path) -> None:
    script = write(tmp_path, "scale(torch.ones(5))\nopen(sys.argv[1], 'w').close()\ntime.sleep(60)\n")
    ready = tmp_path / "ready"
    with subprocess.Popen(
        [sys.executable, "-m", "kvgather", "trace", script, str(ready)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (cli.INTERRUPTED, FOUND + "\n", "kvgather: interrupted\n")


def test_the_readmes_example(tmp_path: Path) -> None:
    section = README.split("## For your own kernels")[1].split("\n## ")[0]
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "two.py").write_text(code)
    assert len([line for line in code.splitlines() if line]) <= 10
    status, stdout, stderr = run("two.py", cwd=tmp_path)
    assert (status, stdout, stderr) == (cli.NOT_AS_EXPECTED, printed.split("two.py\n", 1)[1], "")
