"""Every chapter keeps every rule, and every rule catches a chapter that breaks it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kvgather.workbook.tables import table_html, table_text
from tests.notebooks import exercise_cells
from tests.notebooks.hygiene import CHAPTERS, FOLDER, RULES, Notebook, complaints

BANNER = """# 00 · Start here
> **5 minutes** · runs on any machine, no GPU needed
>
> You will be able to: **run** a cell, **read** a verdict,
> **open** a hint
>
> [01 · Next](01_next.ipynb) →"""
FOLDED = """<details><summary>Hint</summary>look</details>
<details><summary>Solution</summary>

```python
a = 1
```
</details>"""
ENDING = """## What you know now
- one
- two
- three

**In the package:** [cache](../kvgather/cache.py)

**Sources:** [torch](https://docs.pytorch.org)

**Next:** [01 Next](01_next.ipynb)"""


def test_chapters_are_numbered_without_a_gap() -> None:
    numbers = [Notebook.read(path).number for path in CHAPTERS]
    whole = [number for number in numbers if number.isdigit()]
    assert len(numbers) == len(set(numbers))
    assert set(whole) == {f"{i:02}" for i in range(12)}
    halves = [(before, number) for before, number in itertools.pairwise(numbers) if not number.isdigit()]
    assert all(number == f"{before}b" for before, number in halves)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_keeps_the_rule(path: Path, name: str) -> None:
    assert complaints(Notebook.read(path), name) == []


def exercise(number: int) -> list[Any]:
    metadata = {"kvgather": {"exercise": f"00.{number}"}}
    check = f'check("00.{number}", a)'
    verdict = new_output("stream", name="stdout", text="not yet: the skeleton is unchanged\n")
    return [
        new_markdown_cell(f"### Exercise 00.{number} — Add\nAdd."),
        new_code_cell("a = ...", metadata={"tags": ["exercise"], **metadata}),
        new_markdown_cell(FOLDED),
        new_code_cell(check, metadata={"tags": ["check"], **metadata}, outputs=[verdict]),
    ]


def good_notebook() -> Any:
    """A notebook that keeps all rules: seven code cells, two exercises, two pictures, a table, an ignored output."""
    picture = new_output("display_data", data={"image/png": "", "text/plain": "[figure: a line]"})
    numbers = [("a", 1)], ["name", "n"]
    sheet = new_output("display_data", data={"text/html": table_html(*numbers), "text/plain": table_text(*numbers)})
    picture.metadata = nbformat.from_dict({"image/png": {"alt": "a line"}})
    cells = [
        new_markdown_cell(BANNER),
        new_code_cell("show(line)\ntable(rows, headers)", outputs=[picture, sheet]),
        new_code_cell("assert 1 + 1 == 2\nclock()", metadata={"tags": ["nbval-ignore-output"]}),
        *exercise(1),
        *exercise(2),
        new_code_cell("fig = draw(a)\nshow(fig)", outputs=[picture], metadata={"jupyter": {"source_hidden": True}}),
        new_markdown_cell(ENDING),
    ]
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": spec})


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[str]]:
    """What a rule says to a notebook 00 that lies in a repository of its own."""
    (tmp_path / "kvgather").mkdir()
    (tmp_path / "kvgather" / "cache.py").touch()
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 · Next")]), folder / "01_next.ipynb")
    monkeypatch.setattr(exercise_cells, "exercises", lambda chapter: [f"{chapter}.1", f"{chapter}.2"])
    answers = {"00.1": [("a = 2", "a"), ("a = 3", "a")], "00.2": [("a = 2", "a"), ("a = 3", "a")]}
    monkeypatch.setattr(exercise_cells, "wrong_answers", lambda chapter: copy.deepcopy(answers))

    def apply(content: Any, name: str) -> list[str]:
        path = folder / "00_start.ipynb"
        nbformat.write(content, path)
        return complaints(Notebook.read(path), name)

    return apply


@pytest.mark.parametrize("name", RULES)
def test_rule_accepts_a_good_notebook(judge: Callable[[Any, str], list[str]], name: str) -> None:
    assert judge(good_notebook(), name) == []


def set_source(place: int, source: str) -> Callable[[Any], None]:
    return lambda notebook: notebook.cells[place].update(source=source)


def replace(place: int, old: str, new: str) -> Callable[[Any], None]:
    def apply(notebook: Any) -> None:
        assert old in notebook.cells[place].source
        notebook.cells[place].source = notebook.cells[place].source.replace(old, new)

    return apply


def set_outputs(place: int, *outputs: Any) -> Callable[[Any], None]:
    return lambda notebook: notebook.cells[place].update(outputs=list(outputs))


def set_tags(place: int, *names: str) -> Callable[[Any], None]:
    return lambda notebook: notebook.cells[place].metadata.update(tags=list(names))


def text(content: str) -> Any:
    return new_output("stream", name="stdout", text=content)


def html(content: str, plain: str) -> Any:
    return new_output("display_data", data={"text/html": content, "text/plain": plain})


PICTURE, TIMED, TASK, SKELETON, HINT, CHECK = range(1, 7)
FOLDED_PICTURE = -2
PRINTED = text("name      n\n------  ---\na         1\n")


def fold(place: int) -> Callable[[Any], None]:
    return lambda notebook: notebook.cells[place].metadata.update(jupyter={"source_hidden": True})


def unfold(notebook: Any) -> None:
    notebook.cells[FOLDED_PICTURE].metadata.clear()


def open_and_fold(notebook: Any) -> None:
    notebook.cells[FOLDED_PICTURE].metadata.update(kvgather={"open": "its code tells the story"})


def use_later(notebook: Any) -> None:
    notebook.cells.insert(len(notebook.cells) - 1, new_code_cell("print(fig)"))


BROKEN: list[tuple[str, str, Callable[[Any], None]]] = [
    ("executed_in_order", "counts [None, 2", lambda nb: nb.cells[1].update(execution_count=None)),
    ("executed_in_order", "counts [7, 2", lambda nb: nb.cells[1].update(execution_count=7)),
    ("plain_python_kernel", "'name': 'mine'", lambda nb: nb.metadata.kernelspec.update(name="mine")),
    ("nothing_personal_in_metadata", "'widgets'", lambda nb: nb.metadata.update(widgets={})),
    ("nothing_personal_in_metadata", "'execution'", lambda nb: nb.cells[1].metadata.update(execution={})),
    ("speaking_cells_have_outputs", "cell 1 prints or shows", set_outputs(PICTURE)),
    ("speaking_cells_have_outputs", "cell 6 prints or shows", set_outputs(CHECK)),
    ("outputs_are_text_or_png", "stderr", set_outputs(PICTURE, new_output("stream", name="stderr", text="!"))),
    ("outputs_are_text_or_png", "ValueError", set_outputs(PICTURE, new_output("error", ename="ValueError"))),
    ("outputs_are_text_or_png", "svg", set_outputs(1, new_output("display_data", data={"image/svg+xml": ""}))),
    ("outputs_are_text_or_png", "not a table", set_outputs(1, html("<table></table>", "a table"))),
    ("outputs_are_text_or_png", "not a table", set_outputs(1, html(table_html([(1, 2)], ["a", "b"]), ""))),
    ("tables_are_html", "cell 1 prints a table", set_outputs(PICTURE, PRINTED)),
    ("drawing_cells_are_folded", "only draws; fold it", unfold),
    ("drawing_cells_are_folded", "cell 2 is folded, but its outputs", fold(TIMED)),
    ("drawing_cells_are_folded", "cell 1 is folded, but its outputs", fold(PICTURE)),
    ("drawing_cells_are_folded", "for the reader to see", open_and_fold),
    ("drawing_cells_are_folded", "later cells use its fig", use_later),
    ("links_to_the_next_chapter", "not '**Next:**", replace(-1, "**Next:** [01 Next](01_next.ipynb)", "")),
    ("links_to_the_next_chapter", "not '**Next:**", replace(-1, "[01 Next]", "[01 · Next]")),
    ("outputs_are_the_same_everywhere", "0x7f", set_outputs(PICTURE, text("<object at 0x7f3a>"))),
    ("outputs_are_the_same_everywhere", "/home", set_outputs(PICTURE, text("in /home/me/kvgather/cache.py"))),
    ("code_runs_in_any_folder", "cell 2 has the path ../results", set_source(TIMED, 'read("../results")')),
    ("pictures_have_alt_texts", "cell 1", lambda nb: nb.cells[1].outputs[0].metadata.clear()),
    ("pictures_have_alt_texts", "cell 3 has an image", set_source(TASK, "![](../picture.png)")),
    ("cells_are_short", "cell 2 has 30 lines", set_source(TIMED, "\n" * 29)),
    ("cells_are_short", "cell 5 has 30 lines", replace(HINT, "a = 1", "a = 1" + "\n" * 29)),
    ("cells_are_short", "cell 5 has 30 lines", replace(HINT, "look", "look" + "\n" * 29)),
    ("links_resolve", "07_gone.ipynb", set_source(TASK, "see [this](07_gone.ipynb)")),
    ("links_resolve", "../kvgather/gone.py", replace(-1, "cache.py", "gone.py")),
    ("few_outputs_are_ignored", "2 of 7", set_tags(PICTURE, "nbval-ignore-output")),
    ("few_outputs_are_ignored", "asserts nothing", set_source(TIMED, "clock()")),
    ("no_tag_hides_a_cell_from_nbval", "nbval-skip", set_tags(PICTURE, "nbval-skip")),
    ("opens_with_the_banner", "title", replace(0, "# 00", "# 01")),
    ("opens_with_the_banner", "first line", replace(0, "**5 minutes**", "5 minutes")),
    ("opens_with_the_banner", "first line", replace(0, ", no GPU needed", "")),
    ("opens_with_the_banner", "bold verbs", replace(0, "**open**", "open")),
    ("opens_with_the_banner", "last line", replace(0, "[01 · Next](01_next.ipynb) →", "")),
    ("opens_with_the_banner", "last line", replace(0, "01 · Next", "01 · Nex")),
    ("opens_with_the_banner", "first cell", lambda nb: nb.cells.pop(0)),
    ("ends_with_what_you_know", "lacks", replace(-1, "**Sources:**", "Sources:")),
    ("ends_with_what_you_know", "has 4 lines", replace(-1, "- one", "- one\n- and a half")),
    ("ends_with_what_you_know", "no file", replace(-1, "../kvgather/cache.py", "01_next.ipynb")),
    ("ends_with_what_you_know", "no link", replace(-1, "[torch](https://docs.pytorch.org)", "torch")),
    ("exercises_have_four_cells", "1 exercises", lambda nb: nb.cells.__delitem__(slice(3, 7))),
    ("exercises_have_four_cells", "not four cells", lambda nb: nb.cells.insert(5, new_markdown_cell("more"))),
    ("exercises_have_four_cells", "begin with", replace(TASK, "00.1", "00.2")),
    ("exercises_have_four_cells", "names the exercise", lambda nb: nb.cells[4].metadata.pop("kvgather")),
    ("exercises_have_four_cells", "hint is not folded", replace(HINT, "<summary>Hint</summary>", "Hint")),
    ("exercises_have_four_cells", "no ```python", replace(HINT, "```python", "```")),
    ("exercises_have_four_cells", "last cell", replace(CHECK, "check(", "assert check(")),
    ("exercises_have_four_cells", "1 cells are tagged check", set_tags(CHECK)),
    ("exercises_have_checks_and_wrong_answers", "checks", lambda nb: nb.cells.__delitem__(slice(3, 7))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "said", "damage"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_rule_catches_a_bad_notebook(
    judge: Callable[[Any, str], list[str]], name: str, said: str, damage: Callable[[Any], None]
) -> None:
    notebook = good_notebook()
    damage(notebook)
    assert said in "\n".join(judge(notebook, name))


def test_a_cell_that_draws_may_stay_open_for_a_reason(judge: Callable[[Any, str], list[str]]) -> None:
    notebook = good_notebook()
    notebook.cells[FOLDED_PICTURE].metadata = nbformat.from_dict({"kvgather": {"open": "its code tells the story"}})
    assert judge(notebook, "drawing_cells_are_folded") == []
    use_later(notebook)
    notebook.cells[FOLDED_PICTURE - 1].metadata.clear()
    assert judge(notebook, "drawing_cells_are_folded") == []


def test_rule_catches_missing_wrong_answers(
    judge: Callable[[Any, str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exercise_cells, "wrong_answers", lambda chapter: {"00.1": [("a = 2", "a")] * 2, "00.3": []})
    said = judge(good_notebook(), "exercises_have_checks_and_wrong_answers")
    assert ["00.2 has 0 wrong answers" in said[0], "00.3, which does not exist" in said[1]] == [True, True]


def test_every_rule_is_tested() -> None:
    assert {name for name, _, _ in BROKEN} == set(RULES)


def test_the_folder_holds_nothing_but_chapters_and_the_glossary() -> None:
    found = {path.name for path in FOLDER.iterdir() if not path.name.startswith(".") and path.name != "__pycache__"}
    assert found == {path.name for path in CHAPTERS} | {"glossary.md"}
