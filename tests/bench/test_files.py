"""Files of results are replaced atomically, and rows name the commit of this repository only."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from kvgather import files
from kvgather.bench import machine, results


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_a_clone_and_of_no_other_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(folder: Path) -> Path:
        file = folder / "kvgather" / "bench" / "machine.py"
        file.parent.mkdir(parents=True)
        file.write_text("x = 1\n")
        return file

    other = tmp_path / "other rëpository"
    other.mkdir()
    git(other, "init", "-q")
    (other / "own.txt").write_text("x")
    git(other, "add", "own.txt")
    git(other, "commit", "-qm", "own")
    assert machine._commit_of(copy(tmp_path / "nowhere")) == ""
    assert machine._commit_of(copy(other / ".venv" / "site-packages")) == ""  # an installed wheel
    at_top = copy(other)
    assert machine._commit_of(at_top) == ""  # an unpacked one: nothing of it is tracked
    vendored = copy(other / "third_party")
    git(other, "add", str(vendored))
    git(other, "commit", "-qm", "vendored")
    assert machine._commit_of(vendored) == ""
    clone = tmp_path / "clone"
    file = copy(clone)
    git(clone, "init", "-q")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "all")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as in a hook of the other one
    assert machine._commit_of(file) == git(clone, "rev-parse", "--short", "HEAD")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "a.csv", tmp_path / "link.csv"
    files.replace_text(path, "one\n")
    path.chmod(0o640)
    link.symlink_to(path)
    files.replace_text(link, "two\n")
    assert path.read_text() == "two\n" and link.is_symlink() and path.stat().st_mode & 0o777 == 0o640

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            files.replace_text(path, "three\n")
    assert path.read_text() == "two\n"
    assert sorted(tmp_path.iterdir()) == [path, link]
    for bad, error in ((tmp_path, IsADirectoryError), (tmp_path / "no" / "x", FileNotFoundError)):
        with pytest.raises(error):
            files.check_replaceable(bad)
    files.check_replaceable(path)
    files.check_replaceable(Path(os.devnull))
    files.replace_text(Path(os.devnull), "gone")
    assert not Path(os.devnull).is_file() and sorted(tmp_path.iterdir()) == [path, link]


def test_threads_that_write_one_file(tmp_path: Path) -> None:
    path, texts, failed = tmp_path / "a.csv", [f"{i}\n" * 5000 for i in range(2)], []

    def write(text: str) -> None:
        try:
            for _ in range(50):
                files.replace_text(path, text)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and path.read_text() in texts and list(tmp_path.iterdir()) == [path]


def test_committed_results_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    monkeypatch.chdir(tmp_path)
    assert results.find_results() == committed
    monkeypatch.setattr(results, "ROOT", tmp_path / "site-packages")  # an installed copy, and a notebook of a clone
    with pytest.raises(FileNotFoundError, match=r"no folder benchmarks.results in .*; accepted: a clone of the repos"):
        results.find_results()
    monkeypatch.chdir(committed.parents[1] / "notebooks")
    assert results.find_results() == committed
