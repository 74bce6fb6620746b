"""Solved exercises, remembered in the reader's copy of the notebooks.

A check that passes in my-notebooks/ adds its exercise to my-notebooks/.progress.json. A check that runs elsewhere, such
as nbval's in notebooks/, reads and writes nothing. Nothing here fails an exercise: what cannot be stored is a note.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvgather.files import replace_text
from kvgather.workbook import launch
from kvgather.workbook.chapters import Chapter, chapters

__all__ = [
    "ChapterProgress",
    "ProgressError",
    "as_json",
    "note_solved",
    "overview",
    "reader_folder",
    "remember",
    "report",
    "solved",
]

RECORD = ".progress.json"
ABOUT = "solved exercises of the kvgather workbook; `kvgather progress` prints them"
VERSION = 1
PATIENCE = 5.0  # seconds to wait for another kernel, which holds the lock for milliseconds


class ProgressError(ValueError):
    """The record of solved exercises is damaged, or belongs to another program; it is left as it is."""


@dataclass(frozen=True)
class ChapterProgress:
    """A chapter, and which of its exercises are solved, in order."""

    chapter: Chapter
    solved: tuple[str, ...]

    @property
    def text(self) -> str:
        """Such as "3 of 4"."""
        return f"{len(self.solved)} of {len(self.chapter.exercises)}"


def reader_folder() -> Path | None:
    """The reader's copy of the notebooks, if this process runs in it, else None."""
    try:
        folder = (launch.find_root() / launch.COPIES).resolve()
        here = Path.cwd().resolve()
    except (launch.LaunchError, OSError):  # no clone; or the working directory was removed
        return None
    return folder if here == folder or folder in here.parents else None


def solved(folder: Path) -> frozenset[str]:
    """The names of the solved exercises, such as "01.3"; empty if nothing is stored yet.

    Args:
        folder: the reader's copy of the notebooks.

    Raises:
        ProgressError: the record is damaged, or is not a record of this workbook.
        OSError: the record cannot be read.
    """
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return frozenset()
    except (ValueError, RecursionError) as error:
        raise ProgressError(_refusal(path, "it is not JSON")) from error
    if not isinstance(content, dict) or content.get("about") != ABOUT:
        raise ProgressError(_refusal(path, "it is not a record of solved exercises"))
    if content.get("version") != VERSION:
        raise ProgressError(_refusal(path, f"its version is {content.get('version')!r}, accepted: {VERSION}"))
    names = content.get("solved")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProgressError(_refusal(path, "its list of solved exercises is damaged"))
    return frozenset(names)


def remember(folder: Path, name: str) -> frozenset[str]:
    """Add one exercise to the record, and return all solved ones.

    Args:
        folder: the reader's copy of the notebooks.
        name: the exercise, such as "01.3".

    Raises:
        ProgressError: the record is damaged, or is not a record of this workbook; it is left as it is.
        OSError: the record cannot be read or written; it is left as it is.
    """
    with _locked(folder):
        names = solved(folder)
        if name not in names:
            names |= {name}
            content = {"about": ABOUT, "version": VERSION, "solved": sorted(names)}
            replace_text(folder / RECORD, json.dumps(content, indent=1) + "\n")
    return names


def note_solved(name: str, exercises: Sequence[str]) -> str:
    """Remember an exercise that was just solved, and return a line for the reader.

    Args:
        name: the exercise.
        exercises: all exercises of its chapter.

    Returns:
        Such as "3 of 4 solved in this chapter"; the reason if it could not be stored; "" outside of the reader's copy.
    """
    folder = reader_folder()
    if folder is None:
        return ""
    try:
        names = remember(folder, name)
    except ProgressError as error:
        return f"note: not stored as solved, because {error}"
    except OSError as error:
        return f"note: not stored as solved: {folder / RECORD} cannot be written ({error.strerror or error})"
    return f"{len(names.intersection(exercises))} of {len(exercises)} solved in this chapter"


def overview(root: Path, names: frozenset[str]) -> list[ChapterProgress]:
    """Each chapter of a clone, with its exercises that are in `names`.

    Raises:
        ChapterError: a notebook of the clone is not a chapter.
    """
    found = chapters(root / launch.ORIGINALS)
    return [ChapterProgress(chapter, tuple(name for name in chapter.exercises if name in names)) for chapter in found]


def report(rows: Sequence[ChapterProgress]) -> str:
    """The solved exercises of each chapter as lines of text, their sum, and the next one to solve."""
    titles = [f"{row.chapter.number} {row.chapter.title}" for row in rows]
    width = max(map(len, titles), default=0)
    lines = [
        f"{title:<{width}}  {row.text}{'  ' if row.solved else ''}{' '.join(row.solved)}"
        for title, row in zip(titles, rows, strict=True)
    ]
    open_ones = [(name, row.chapter) for row in rows for name in row.chapter.exercises if name not in row.solved]
    done, total = (sum(map(len, names)) for names in _names(rows))
    lines.append(f"{done} of {total} exercises solved")
    if open_ones and done:
        name, chapter = open_ones[0]
        lines.append(f"next: exercise {name}, in {launch.COPIES}/{chapter.file}")
    return "\n".join(lines)


def as_json(rows: Sequence[ChapterProgress]) -> str:
    """The same as a JSON document: an object with `solved`, `exercises` and a list of `chapters`."""
    done, total = (sum(map(len, names)) for names in _names(rows))
    listed = [
        {
            "chapter": row.chapter.number,
            "title": row.chapter.title,
            "file": row.chapter.file,
            "solved": list(row.solved),
            "exercises": list(row.chapter.exercises),
        }
        for row in rows
    ]
    return json.dumps({"solved": done, "exercises": total, "chapters": listed}, indent=1, ensure_ascii=False) + "\n"


def _names(rows: Sequence[ChapterProgress]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    return [row.solved for row in rows], [row.chapter.exercises for row in rows]


def _refusal(path: Path, reason: str) -> str:
    return f"{path} cannot be used ({reason}); it is left as it is. Rename or delete it to begin a new record"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two kernels that solve an exercise at once write one after the other.

    The lock is on the folder itself, so it leaves no file and ends with its process. Windows, and a file system without
    locks, do without one.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl
    import os

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise TimeoutError(f"another process has locked {folder}") from error
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
