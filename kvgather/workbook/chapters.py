"""The chapters of the workbook, as their notebooks describe themselves: title, minutes, abilities, exercises."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Chapter", "ChapterError", "chapter_of", "chapters"]

PATTERN = "[0-9][0-9]*_*.ipynb"
BANNER = re.compile(
    r"# (?P<number>\w+) · (?P<title>[^\n]+)\n"
    r"> \*\*(?P<minutes>\d+) minutes\*\* · runs on (?P<runs_on>[^\n]+?), (?P<gpu>no GPU needed|needs a GPU)\n"
    r">\n> You will be able to: (?P<abilities>.+?)(?:\n>\n|\Z)",
    flags=re.S,
)


class ChapterError(ValueError):
    """A notebook is not a chapter of the workbook; the message names the file and the reason."""


@dataclass(frozen=True)
class Chapter:
    """What the first cell of a chapter says, and the chapter's exercises.

    Attributes:
        number, title: such as "03" and "Layouts".
        file: name of the notebook's file.
        minutes: how long a reader takes.
        runs_on: machines that can run it.
        needs_gpu: whether it runs on a GPU alone.
        abilities: what a reader can do afterwards, without markup.
        exercises: names of the exercises, such as "03.1", in order.
    """

    number: str
    title: str
    file: str
    minutes: int
    runs_on: str
    needs_gpu: bool
    abilities: str
    exercises: tuple[str, ...]


def chapters(folder: Path) -> list[Chapter]:
    """All chapters of a folder, in order.

    Raises:
        ChapterError: a notebook cannot be read, or does not begin with a chapter's banner.
    """
    return [chapter_of(path) for path in sorted(folder.glob(PATTERN))]


def chapter_of(path: Path) -> Chapter:
    """The chapter in one notebook.

    Raises:
        ChapterError: the notebook cannot be read, or does not begin with a chapter's banner.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        banner = BANNER.match("".join(cells[0]["source"]))
        names = [
            cell["metadata"]["kvgather"]["exercise"] for cell in cells if "exercise" in cell["metadata"].get("tags", ())
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ChapterError(f"{path} cannot be read as a chapter ({type(error).__name__}: {error})") from error
    if banner is None:
        raise ChapterError(f"{path} does not begin with a chapter's banner")
    abilities = " ".join(banner["abilities"].replace("\n>", "\n").replace("**", "").split())
    return Chapter(
        number=banner["number"],
        title=banner["title"].strip(),
        file=path.name,
        minutes=int(banner["minutes"]),
        runs_on=banner["runs_on"],
        needs_gpu=banner["gpu"] != "no GPU needed",
        abilities=abilities,
        exercises=tuple(names),
    )
