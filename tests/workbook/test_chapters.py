"""A chapter's banner and exercises are read from its notebook."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvgather.workbook.chapters import ChapterError, chapter_of, chapters

BANNER = """# 08b · Two paths
> **45 minutes** · runs on any machine with Triton (Linux), no GPU needed
>
> You will be able to: **merge** two halves, **choose** between
> two **ways**
>
> ← [08 · Prefix path](08_prefix_path.ipynb)

The story begins."""


def write(path: Path, banner: str, *exercises: str) -> Path:
    cells = [{"cell_type": "markdown", "metadata": {}, "source": banner.splitlines(keepends=True)}]
    cells += [
        {"cell_type": "code", "metadata": {"tags": [tag], "kvgather": {"exercise": name}}, "source": ""}
        for name in exercises
        for tag in ("exercise", "check")
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return path


def test_a_chapter_describes_itself(tmp_path: Path) -> None:
    chapter = chapter_of(write(tmp_path / "08b_two_paths.ipynb", BANNER, "08b.1", "08b.2"))
    assert (chapter.number, chapter.title, chapter.minutes) == ("08b", "Two paths", 45)
    assert chapter.runs_on == "any machine with Triton (Linux)" and not chapter.needs_gpu
    assert chapter.abilities == "merge two halves, choose between two ways"
    assert chapter.exercises == ("08b.1", "08b.2")
    assert chapter.file == "08b_two_paths.ipynb"


def test_the_second_half_of_a_chapter_follows_the_first(tmp_path: Path) -> None:
    for name in ("09_serving", "08b_two_paths", "08_prefix_path", "notes"):
        write(tmp_path / f"{name}.ipynb", BANNER)
    assert [chapter.file[:3] for chapter in chapters(tmp_path)] == ["08_", "08b", "09_"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{ half", "cannot be read as a chapter"),
        ("[]", "cannot be read as a chapter"),
        ('{"cells": []}', "cannot be read as a chapter"),
        ('{"cells": [{"source": "# 01 · Title", "metadata": {}}]}', "does not begin with a chapter's banner"),
    ],
)
def test_another_file_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "01_other.ipynb"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ChapterError, match=reason) as caught:
        chapters(tmp_path)
    assert str(path) in str(caught.value)
