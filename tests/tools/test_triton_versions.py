"""What `make test-triton` installs and runs, and when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="triton_versions.sh needs a POSIX shell")
ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
case "$*" in
    --version) echo "Python 3.12.0" ;;
    *"pip install"*)
        case "$*" in *triton==3.99.0*) exit 1 ;; esac
        while [ "$1" != --target ]; do shift; done
        mkdir "$2"
        echo "install $3" >>log ;;
    *pytest*)
        shift 2
        echo "test $KVGATHER_TRITON $PYTHONPATH $*" >>log
        [ "$KVGATHER_TRITON" != "$FAILS" ] ;;
esac
"""


def run(root: Path, versions: str, fails: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script in a clone whose Python writes a log; returns the process and the log's lines."""
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    log = root / "log"
    log.write_text("")
    script = ROOT / "tools/triton_versions.sh"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"FAILS": fails}
    process = subprocess.run(
        ["sh", script, versions, "tests/lab"], cwd=root, env=environment, capture_output=True, text=True
    )
    return process, log.read_text().splitlines()


def test_each_version_is_installed_once_and_tested_on_its_own_path(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    tests = [f"test {version} {clone}/.venv/triton-{version} tests/lab" for version in ("3.6.0", "3.9.0")]
    process, log = run(clone, "3.6.0 3.9.0")
    assert process.returncode == 0, process.stderr
    assert log == ["install triton==3.6.0", "install triton==3.9.0", *tests]
    assert run(clone, "3.6.0 3.9.0")[1] == tests


def test_a_failing_version_fails_the_whole_after_the_others_ran(tmp_path: Path) -> None:
    process, log = run(tmp_path / "clone", "3.6.0 3.9.0", fails="3.6.0")
    assert process.returncode == 1
    assert "tests failed on triton 3.6.0\n" in process.stderr
    assert [line.split()[:2] for line in log if line.startswith("test")] == [["test", "3.6.0"], ["test", "3.9.0"]]


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ("3.6.0 3.99.0", "triton 3.99.0 cannot be installed for Python 3.12.0 on this machine"),
        ("3.6", "'3.6' is not a full version such as 3.6.0"),
        ("", 'name the versions: make test-triton VERSIONS="3.6.0 3.9.0"'),
    ],
)
def test_nothing_is_tested_when_a_version_is_not_to_be_had(tmp_path: Path, versions: str, message: str) -> None:
    process, log = run(tmp_path / "clone", versions)
    assert process.returncode == 1
    assert message in process.stderr
    assert not [line for line in log if line.startswith("test")]


def test_tests_do_not_run_on_another_triton_than_the_wanted_one() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", str(Path(__file__))],
        cwd=ROOT, env=os.environ | {"KVGATHER_TRITON": "3.99.0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert "KVGATHER_TRITON is 3.99.0, and the imported triton is " in process.stderr
