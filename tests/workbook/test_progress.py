"""Solved exercises last: stored in the reader's copy alone, never lost, never an exception in a check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvgather import cli, files
from kvgather.lab.child import environment
from kvgather.workbook import checks, launch, progress
from kvgather.workbook.chapter_map import chapter_map
from kvgather.workbook.checks import check, exercise
from kvgather.workbook.progress import ProgressError, note_solved, remember, solved
from tests.workbook.test_chapters import BANNER, write

NAMES = ["08b.1", "08b.2", "08b.3"]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's copy in a clone with one chapter, as the working directory of this process."""
    root = tmp_path / "a clone"
    write(root / "notebooks/08b_two_paths.ipynb", BANNER, *NAMES)
    folder = root / "my-notebooks"
    folder.mkdir()
    monkeypatch.setattr(launch, "find_root", lambda: root)
    monkeypatch.chdir(folder)
    return folder


def test_a_solved_exercise_is_counted(copy: Path) -> None:
    assert note_solved("08b.2", NAMES) == "1 of 3 solved in this chapter"
    assert note_solved("08b.2", NAMES) == "1 of 3 solved in this chapter"
    assert note_solved("08b.1", NAMES) == "2 of 3 solved in this chapter"
    assert solved(copy) == {"08b.1", "08b.2"}
    assert [path.name for path in copy.iterdir()] == [".progress.json"]


def test_exercises_of_other_chapters_do_not_count(copy: Path) -> None:
    remember(copy, "00.1")
    assert note_solved("08b.3", NAMES) == "1 of 3 solved in this chapter"


def test_a_subfolder_belongs_to_the_copy(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "tries").mkdir()
    monkeypatch.chdir(copy / "tries")
    assert note_solved("08b.1", NAMES).startswith("1 of 3")
    assert solved(copy) == {"08b.1"}


@pytest.mark.parametrize("place", ["notebooks", ".", "my-notebooks-2"])
def test_a_check_elsewhere_stores_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    elsewhere = copy.parent / place
    elsewhere.mkdir(exist_ok=True)
    monkeypatch.chdir(elsewhere)
    before = sorted(copy.parent.rglob("*"))
    assert note_solved("08b.1", NAMES) == ""
    assert sorted(copy.parent.rglob("*")) == before


def test_a_check_prints_the_count_after_its_verdict(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "exercises", lambda chapter: NAMES)
    monkeypatch.setattr(checks, "_REGISTRY", {})
    exercise("08b.1")(lambda answer: None if answer == 1 else "it is not 1")
    for answer in (..., 2, 1):
        check("08b.1", answer)
    assert capsys.readouterr().out.splitlines() == [
        "not yet: the skeleton is unchanged; fill it in",
        "wrong: it is not 1",
        "correct: well done",
        "1 of 3 solved in this chapter",
    ]


def test_the_real_checks_store_nothing_here(capsys: pytest.CaptureFixture[str]) -> None:
    check("00.1", 48)
    assert capsys.readouterr().out == "correct: three blocks of 16 slots hold 48 tokens\n"


DAMAGED = [
    ("", "it is not JSON"),
    ('{"about": ', "it is not JSON"),
    ("\ufeff{}", "it is not JSON"),
    ("[" * 100_000, "it is not JSON"),
    ("[]", "it is not a record"),
    ('{"solved": ["08b.1"]}', "it is not a record"),
    (json.dumps({"about": progress.ABOUT, "version": 2, "solved": []}), "its version is 2, accepted: 1"),
    (json.dumps({"about": progress.ABOUT, "version": 1, "solved": {"08b.1": 1}}), "its list of solved exercises"),
    (json.dumps({"about": progress.ABOUT, "version": 1, "solved": [1]}), "its list of solved exercises"),
]


@pytest.mark.parametrize(("content", "reason"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_or_foreign_record_is_reported_and_kept(
    copy: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    path = copy / ".progress.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ProgressError, match=reason):
        solved(copy)
    line = note_solved("08b.1", NAMES)
    assert line.startswith("note: not stored as solved, because ") and reason in line and str(path) in line
    assert cli.main(["progress"]) == cli.FAILED
    assert reason in capsys.readouterr().err
    chapter_map()
    assert reason in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == content


def test_bytes_that_are_no_text_are_kept(copy: Path) -> None:
    (copy / ".progress.json").write_bytes(b"\xff\xfe\x00")
    assert "it is not JSON" in note_solved("08b.1", NAMES)
    assert (copy / ".progress.json").read_bytes() == b"\xff\xfe\x00"


def test_a_folder_in_place_of_the_record_is_a_note(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / ".progress.json").mkdir()
    assert note_solved("08b.1", NAMES).startswith("note: not stored as solved: ")
    assert cli.main(["progress"]) == cli.FAILED
    assert "Is a directory" in capsys.readouterr().err


def test_a_full_disk_is_a_note_and_the_record_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(copy, "08b.1")
    before = (copy / ".progress.json").read_bytes()
    path = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "x":
            raise OSError(28, "No space left on device")
        return path(self, mode, *arguments, **options)

    monkeypatch.setattr(files.Path, "open", full)
    line = note_solved("08b.2", NAMES)
    assert line.endswith("cannot be written (No space left on device)")
    assert (copy / ".progress.json").read_bytes() == before
    assert note_solved("08b.1", NAMES) == "1 of 3 solved in this chapter"  # nothing to write


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders are POSIX's")
def test_a_folder_without_write_permission_is_a_note(copy: Path) -> None:
    """In a child process that is not root, which may write everywhere."""
    copy.chmod(0o555)
    code = f"""
import os, sys
from pathlib import Path
from kvgather.workbook import progress
progress.reader_folder = lambda: Path(".")
os.chdir({str(copy)!r})
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
print(progress.note_solved("08b.1", ["08b.1"]))
"""
    try:
        child = run_child(code)
    finally:
        copy.chmod(0o755)
    assert child.returncode == 0, child.stderr
    assert "note: not stored as solved: " in child.stdout and "Permission denied" in child.stdout


def run_child(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = environment(PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.mark.skipif(os.name == "nt", reason="without a lock on Windows")
def test_kernels_at_once_lose_no_exercise(copy: Path) -> None:
    code = """
import sys
from pathlib import Path
from kvgather.workbook.progress import remember
for number in range(25):
    remember(Path(sys.argv[1]), f"{sys.argv[2]}.{number}")
"""
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(copy), name], env=environment())
        for name in ("01", "02", "03")
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert solved(copy) == {f"{name}.{number}" for name in ("01", "02", "03") for number in range(25)}


@pytest.mark.skipif(os.name == "nt", reason="without a lock on Windows")
def test_a_kernel_that_never_ends_is_a_note(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    descriptor = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        line = note_solved("08b.1", NAMES)
    finally:
        os.close(descriptor)
    assert "another process has locked" in line
    assert note_solved("08b.1", NAMES).startswith("1 of 3")


def test_the_command_prints_each_chapter(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remember(copy, "08b.2")
    remember(copy, "07.9")  # of a chapter that does not exist any more
    assert cli.main(["progress"]) == cli.OK
    assert capsys.readouterr().out.splitlines() == [
        "08b Two paths  1 of 3  08b.2",
        "1 of 3 exercises solved",
        "next: exercise 08b.1, in my-notebooks/08b_two_paths.ipynb",
    ]


def test_the_command_without_a_copy_says_how_to_get_one(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chdir(copy.parent)
    copy.rmdir()
    assert cli.main(["progress"]) == cli.OK
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "08b Two paths  0 of 3"
    assert printed[-1] == "There is no my-notebooks folder yet: `make lab` makes it and opens the first chapter."


def test_the_command_writes_json(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remember(copy, "08b.2")
    assert cli.main(["progress", "--json", "-"]) == cli.OK
    content = json.loads(capsys.readouterr().out)
    assert (content["solved"], content["exercises"]) == (1, 3)
    assert content["chapters"][0]["solved"] == ["08b.2"] and content["chapters"][0]["exercises"] == NAMES
    path = tmp_path / "progress.json"
    assert cli.main(["progress", "--json", str(path)]) == cli.OK
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert "1 of 3 exercises solved" in capsys.readouterr().out
    assert cli.main(["progress", "--json", str(tmp_path)]) == cli.FAILED
    assert "is a folder" in capsys.readouterr().err


def test_the_command_outside_of_a_clone_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> Path:
        raise launch.LaunchError("there is no notebooks folder in here; accepted: a clone of the repository")

    monkeypatch.setattr(launch, "find_root", nowhere)
    assert cli.main(["progress"]) == cli.USAGE
    assert "accepted: a clone" in capsys.readouterr().err
    assert progress.reader_folder() is None


def test_the_map_has_a_row_for_each_chapter_with_its_count(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("kvgather.workbook.tables.display", lambda forms, raw: shown.append(forms))
    remember(copy, "08b.2")
    chapter_map()
    assert '<a href="08b_two_paths.ipynb">08b · Two paths</a>' in shown[0]["text/html"]
    assert "1 of 3" in shown[0]["text/plain"]
    os.chdir(copy.parent / "notebooks")
    chapter_map()
    assert "0 of 3" in shown[1]["text/plain"]
