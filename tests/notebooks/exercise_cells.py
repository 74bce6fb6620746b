"""Exercises as the cells of a notebook, and the rule about their shape."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgather.workbook.checks import exercises
from tests.notebooks.hygiene import Notebook, rule, tags

MOST = {"11": 11}
"""Exercises of a chapter that may have more than four: the hunt has one for each bug, and a kernel of one's own."""
WRONG_ANSWERS = Path(__file__).parent / "wrong_answers"


@dataclass(frozen=True)
class Exercise:
    name: str
    place: int  # of its skeleton among the notebook's cells
    skeleton: str
    solution: str
    check: str


def exercises_of(notebook: Notebook) -> list[Exercise]:
    """The exercises of a notebook whose shape is right."""
    found = []
    for i, cell in notebook.code:
        if "exercise" in tags(cell):
            text, check = notebook.cells[i + 1].source, notebook.cells[i + 2].source
            found.append(Exercise(cell.metadata["kvgather"]["exercise"], i, cell.source, _solution(text), check))
    return found


def wrong_answers(chapter: str) -> dict[str, list[tuple[str, str]]]:
    """Of each exercise: replacements of its skeleton, with a part of what the check must say to each."""
    path = WRONG_ANSWERS / f"ch{chapter}.py"
    spec = importlib.util.spec_from_file_location(f"wrong_answers_ch{chapter}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers: dict[str, list[tuple[str, str]]] = module.WRONG
    return answers


@rule
def exercises_have_four_cells(notebook: Notebook) -> list[str]:
    places = [i for i, cell in notebook.code if "exercise" in tags(cell)]
    found = []
    most = MOST.get(notebook.number, 4)
    if not 2 <= len(places) <= most:
        found.append(f"there are {len(places)} exercises, not 2 to {most}")
    for number, i in enumerate(places, start=1):
        around = notebook.cells[i - 1 : i + 3] if i else []
        found += [
            f"exercise {notebook.number}.{number}: {text}" for text in _shape(f"{notebook.number}.{number}", around)
        ]
    checks = sum("check" in tags(cell) for _, cell in notebook.code)
    if checks != len(places):
        found.append(f"{checks} cells are tagged check, and {len(places)} exercise")
    return found


def _shape(name: str, cells: list[Any]) -> list[str]:
    if [cell.cell_type for cell in cells] != ["markdown", "code", "markdown", "code"]:
        return ["it is not four cells: task, skeleton, hint and solution, check"]
    task, skeleton, folded, check = cells
    found = []
    if f"### Exercise {name} — " not in task.source:
        found.append(f"its task does not begin with '### Exercise {name} — '")
    for cell in (skeleton, check):
        if cell.metadata.get("kvgather", {}).get("exercise") != name:
            found.append(f"a cell's metadata names the exercise {cell.metadata.get('kvgather')}")
    for part in ("Hint", "Solution"):
        summary = rf"<summary>{part}( 1)?</summary>"  # hints in steps are Hint 1, Hint 2, …
        if not re.search(rf"<details>\s*{summary}.*?</details>", folded.source, flags=re.S):
            found.append(f"its {part.lower()} is not folded in <details>")
    if not _solution(folded.source):
        found.append("its solution has no ```python block")
    if "check" not in tags(check) or not re.fullmatch(rf'check\("{re.escape(name)}", .+\)', check.source):
        found.append(f'its last cell is not the line check("{name}", …), tagged check')
    return found


def _solution(markdown: str) -> str:
    folded = re.search(r"<summary>Solution</summary>(.*?)</details>", markdown, flags=re.S)
    block = re.search(r"```python\n(.*?)```", folded[1], flags=re.S) if folded else None
    return block[1].rstrip("\n") if block else ""


@rule
def exercises_have_checks_and_wrong_answers(notebook: Notebook) -> list[str]:
    names = [exercise.name for exercise in exercises_of(notebook)]
    found = []
    if (known := exercises(notebook.number)) != names:
        found.append(f"the notebook has the exercises {names}, and the checks {known}")
    wrong = wrong_answers(notebook.number)
    found += [
        f"{name} has {len(wrong.get(name, []))} wrong answers, not 2 or more"
        for name in names
        if len(wrong.get(name, [])) < 2
    ]
    found += [f"there are wrong answers to {name}, which does not exist" for name in wrong if name not in names]
    return found
