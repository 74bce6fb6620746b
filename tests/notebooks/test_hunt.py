"""Chapter 11 says of every bug what the registry says: the report, the code, the hints, the threads."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.notebooks.exercise_cells import exercises_of
from tests.notebooks.hygiene import FOLDER, Notebook

pytestmark = pytest.mark.triton
hunt = pytest.importorskip("kvgather.lab.hunt", reason="needs Triton, which has no build for this machine")
fixes = importlib.import_module("tests.lab.hunt.fixes")


@pytest.fixture(scope="module")
def chapter() -> Notebook:
    return Notebook.read(FOLDER / "11_the_hunt.ipynb")


@pytest.mark.parametrize(("number", "bug"), list(enumerate(hunt.BUGS.values())), ids=list(hunt.BUGS))
def test_the_cells_of_a_bug(chapter: Notebook, number: int, bug: Any) -> None:
    exercise = exercises_of(chapter)[number]
    story, meet, task, skeleton, folded, check = chapter.cells[exercise.place - 3 : exercise.place + 3]
    assert story.source.startswith(
        f"## {number + 1} · {bug.title}\n\n> {bug.report}\n\nDifficulty: {bug.difficulty} of 4"
    )
    assert meet.source == f'meet("{bug.name}")'
    assert f"`{hunt.geometry_label(bug.shows)}`" in task.source and f"kernels/{bug.name}.py" in task.source
    assert skeleton.source == fixes.skeleton(bug).rstrip()
    for step, hint in enumerate(bug.hints, start=1):
        assert f"<summary>Hint {step}</summary>\n\n{hint}\n" in folded.source
    assert exercise.solution == fixes.answered(bug, next(iter(fixes.RIGHT[bug.name].values()))).rstrip()
    assert bug.why in folded.source
    assert all(f"[{thread.place}]({thread.url}) ({thread.status})" in folded.source for thread in bug.threads)
    assert check.source == f'check("11.{number + 1}", (argument, line, program), fixed)'


def test_the_sources_are_the_threads(chapter: Notebook) -> None:
    sources = chapter.cells[-1].source.split("**Sources:**")[1]
    assert all(f"[{thread.place}]({thread.url})" in sources for bug in hunt.BUGS.values() for thread in bug.threads)


def test_nothing_before_the_solutions_tells_an_answer(chapter: Notebook) -> None:
    """The first cells, and what each bug prints, name no line, no family and no violation of a bug."""
    shown = [cell for cell in chapter.cells if "<details>" not in cell.source]
    (end,) = (i for i, cell in enumerate(shown) if cell.source.startswith("## What the tools said"))
    text = "\n".join(
        [cell.source for cell in shown[:end] if "exercise" not in cell.metadata.get("tags", [])]
        + [str(output) for cell in shown[:end] if cell.cell_type == "code" for output in cell.outputs]
    )
    for bug in hunt.BUGS.values():
        assert bug.family not in text and bug.fix not in text and not [line for line in bug.lines if line in text]
