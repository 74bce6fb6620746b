"""The reader's copy of the notebooks: made once, never overwritten, offered what is new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvgather.workbook import launch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "a clone"
    write(root / "notebooks/00_start.ipynb", "start")
    write(root / "notebooks/01_cache.ipynb", "cache")
    write(root / "notebooks/.ipynb_checkpoints/00_start-checkpoint.ipynb", "editor's own")
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read_copies(root: Path) -> dict[str, str]:
    found = (path for path in (root / "my-notebooks").rglob("*.ipynb"))
    return {path.relative_to(root / "my-notebooks").as_posix(): path.read_text("utf-8") for path in found}


def test_first_copy_has_every_chapter_and_says_so(clone: Path) -> None:
    said = launch.copy_notebooks(clone)
    assert read_copies(clone) == {"00_start.ipynb": "start", "01_cache.ipynb": "cache"}
    assert len(said) == 1 and "2 files" in said[0]
    assert launch.first_chapter(clone) == "my-notebooks/00_start.ipynb"


def test_nothing_new_changes_nothing(clone: Path) -> None:
    launch.copy_notebooks(clone)
    write(clone / "my-notebooks/01_cache.ipynb", "solved")
    assert launch.copy_notebooks(clone) == []
    assert read_copies(clone)["01_cache.ipynb"] == "solved"


def test_changed_original_lies_beside_the_readers_own(clone: Path) -> None:
    launch.copy_notebooks(clone)
    write(clone / "my-notebooks/01_cache.ipynb", "solved")
    write(clone / "notebooks/01_cache.ipynb", "cache, second edition")
    said = launch.copy_notebooks(clone)
    assert len(said) == 1 and "01_cache.new.ipynb" in said[0]
    assert read_copies(clone) == {
        "00_start.ipynb": "start",
        "01_cache.ipynb": "solved",
        "01_cache.new.ipynb": "cache, second edition",
    }
    assert launch.copy_notebooks(clone) == []


def test_an_offer_is_never_overwritten_either(clone: Path) -> None:
    launch.copy_notebooks(clone)
    for edition in ("second", "third"):
        write(clone / "notebooks/01_cache.ipynb", edition)
        launch.copy_notebooks(clone)
    copies = read_copies(clone)
    assert copies["01_cache.ipynb"] == "cache"
    assert copies["01_cache.new.ipynb"] == "second"
    assert copies["01_cache.new-2.ipynb"] == "third"


def test_deleted_chapter_comes_back_fresh(clone: Path) -> None:
    launch.copy_notebooks(clone)
    (clone / "my-notebooks/00_start.ipynb").unlink()
    assert "1 file " in launch.copy_notebooks(clone)[0]
    assert read_copies(clone)["00_start.ipynb"] == "start"


def test_damaged_record_costs_an_offer_and_no_work(clone: Path) -> None:
    launch.copy_notebooks(clone)
    write(clone / "my-notebooks/.originals.json", "{ half a rec")
    write(clone / "my-notebooks/01_cache.ipynb", "solved")
    launch.copy_notebooks(clone)
    copies = read_copies(clone)
    assert copies["01_cache.ipynb"] == "solved"
    assert copies["01_cache.new.ipynb"] == "cache"


def test_unwritable_clone_is_named(clone: Path) -> None:
    (clone / "my-notebooks").write_text("a file where the folder belongs", encoding="utf-8")
    with pytest.raises(launch.LaunchError, match="cannot be written"):
        launch.copy_notebooks(clone)


@pytest.mark.parametrize(("browser", "present"), [(True, False), (False, True)])
def test_no_browser_reaches_jupyterlab(clone: Path, browser: bool, present: bool) -> None:
    arguments = launch.lab_arguments(clone, browser=browser, extra=["--port", "9999"])
    assert ("--no-browser" in arguments) is present
    assert arguments[-2:] == ["--port", "9999"]
    assert f"--ServerApp.root_dir={clone}" in arguments


def test_what_the_reader_asks_for_wins(clone: Path) -> None:
    arguments = launch.lab_arguments(clone, browser=True, extra=["--ServerApp.log_level=DEBUG"])
    assert [item for item in arguments if item.startswith("--ServerApp.log_level")] == ["--ServerApp.log_level=DEBUG"]


def test_browser_is_not_opened_where_nobody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not launch.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert launch.has_display()
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 22 10.0.0.2 22")
    assert not launch.has_display()


def run_setup(root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    write(root / "pyproject.toml", "")
    write(root / "constraints.txt", "")
    script = (ROOT / "tools/setup.sh").read_text(encoding="utf-8")
    write(root / "tools/setup.sh", script)
    return subprocess.run(
        ["sh", "tools/setup.sh"],
        cwd=root,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(folder: Path, version: str, modules: bool = True) -> Path:
    """A program that answers setup.sh's questions as a Python of that version would."""
    fits = 0 if (3, 11) <= tuple(map(int, version.split("."))) <= (3, 14) else 1
    script = f"""#!/bin/sh
case "$*" in
    *--version*) echo "Python {version}.0" ;;
    *version_info*) exit {fits} ;;
    *ensurepip*) exit {0 if modules else 1} ;;
esac
"""
    path = folder / "python"
    write(path, script)
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name == "nt", reason="setup.sh needs a POSIX shell")
@pytest.mark.parametrize(
    ("version", "modules", "variables", "expected"),
    [
        ("3.9", True, {}, "needs Python 3.11 to 3.14, and found Python 3.9.0"),
        ("3.15", True, {}, "needs Python 3.11 to 3.14, and found Python 3.15.0"),
        ("3.12", False, {}, "lacks its venv module"),
        ("3.12", True, {"TORCH": "mine"}, "TORCH=mine is neither"),
    ],
)
def test_setup_says_what_is_missing(
    tmp_path: Path, version: str, modules: bool, variables: dict[str, str], expected: str
) -> None:
    root = tmp_path / "a clone"
    python = fake_python(tmp_path, version, modules)
    run = run_setup(root, **{"TORCH": "", "PYTHON": str(python), **variables})
    assert run.returncode != 0
    assert expected in run.stderr
    assert not (root / ".venv").exists()


@pytest.mark.skipif(os.name == "nt", reason="setup.sh needs a POSIX shell")
def test_setup_names_a_python_that_is_not_there(tmp_path: Path) -> None:
    run = run_setup(tmp_path / "a clone", PYTHON="/nowhere/python3", TORCH="")
    assert run.returncode != 0
    assert "found no /nowhere/python3" in run.stderr
