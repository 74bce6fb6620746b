"""Every exercise: its skeleton is "not yet", its solution "correct", and its wrong answers are caught with a reason.

A chapter runs once, in one kernel. At each exercise the kernel gets the skeleton, the wrong answers and the
solution, each followed by the check; the rest of the chapter then runs with the solution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.notebooks.exercise_cells import exercises_of, wrong_answers
from tests.notebooks.hygiene import CHAPTERS, Notebook


def attempts(notebook: Notebook, wrong: dict[str, list[tuple[str, str]]]) -> Any:
    """The notebook with every attempt put in, and in the metadata of each check what it must say."""
    cells: list[Any] = []
    exercises = {exercise.place: exercise for exercise in exercises_of(notebook)}
    for i, cell in notebook.code:
        if i not in exercises:
            cells.append(nbformat.from_dict({**cell, "outputs": []}))
            continue
        exercise = exercises[i]
        tries = [(exercise.skeleton, "not yet: ", "")]
        tries += [(source, "wrong: ", said) for source, said in wrong[exercise.name]]
        tries += [(exercise.solution, "correct: ", "")]
        for source, verdict, said in tries:
            cells.append(new_code_cell(source))
            wanted = {"exercise": exercise.name, "verdict": verdict, "said": said}
            cells.append(new_code_cell(exercise.check, metadata={"wanted": wanted}))
    return new_notebook(cells=cells)


def run(content: Any, folder: Path) -> list[str]:
    """Run the cells and return what is not as it must be."""
    client = NotebookClient(
        content,
        timeout=120,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    client.execute()
    return [text for cell in content.cells for text in _failures(cell)]


def _failures(cell: Any) -> list[str]:
    for output in cell.outputs:
        if output.output_type == "error":
            return [f"{output.ename}: {output.evalue} in\n{cell.source}"]
    wanted = cell.metadata.get("wanted")
    if wanted is None:
        return []
    got = "".join(output.get("text", "") for output in cell.outputs).strip()
    if got.startswith(wanted["verdict"]) and wanted["said"] in got and "\n" not in got:
        return []
    return [f"{wanted['exercise']}: expected {wanted['verdict']!r} with {wanted['said']!r}, got {got!r}"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_of_a_chapter(path: Path) -> None:
    notebook = Notebook.read(path)
    assert run(attempts(notebook, wrong_answers(notebook.number)), path.parent) == []


def test_a_bad_exercise_is_caught(tmp_path: Path) -> None:
    """The checks, given a skeleton that is an answer, a wrong answer that is right, and a solution that fails."""
    metadata = {"tags": ["exercise"], "kvgather": {"exercise": "00.1"}}
    folded = "<summary>Solution</summary>\n```python\nanswer = 'nonsense'\n```\n</details>"
    content = new_notebook(
        cells=[
            new_code_cell("from kvgather.workbook.checks import check"),
            new_code_cell("answer = 'a first try'", metadata=metadata),
            new_markdown_cell(folded),
            new_code_cell("print('correct: ' + answer)"),
            new_code_cell("answer.missing"),
        ]
    )
    notebook = Notebook(tmp_path / "00_bad.ipynb", content)
    failures = run(attempts(notebook, {"00.1": [("answer = 'not caught'", "")]}), tmp_path)
    assert failures[0] == "00.1: expected 'not yet: ' with '', got 'correct: a first try'"
    assert failures[1] == "00.1: expected 'wrong: ' with '', got 'correct: not caught'"
    assert failures[2].startswith("AttributeError") and len(failures) == 3
