"""Chapters run with other values and seeds, every constant has a table, and a run that goes wrong is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import poke
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from poke import PokeError, Run, Table, constants, runs_of, table_of, with_constants, with_seed

from tests.notebooks.hygiene import CHAPTERS, ROOT, Notebook
from tests.notebooks.pokes import Refused, Source

PATHS = {Notebook.read(path).number: path for path in CHAPTERS}


def test_every_chapter_has_a_table_and_every_table_a_chapter() -> None:
    assert {path.stem for path in poke.TABLES.glob("ch*.py")} == {f"ch{number}" for number in PATHS}


@pytest.mark.parametrize("number", PATHS)
def test_every_constant_has_other_values_or_a_reason(number: str) -> None:
    notebook, table = Notebook.read(PATHS[number]), table_of(number)
    poked = {name.strip() for names in table.pokes for name in names.split(",")}
    found = [name for name in constants(cell.source for _, cell in notebook.code) if not poke.is_seed(name)]
    assert [name for name in found if name not in poked | {*table.fixed}] == []
    assert [name for name in table.fixed if name not in found or name in poked] == []
    assert all(len(values) >= 2 for values in table.pokes.values()) and all(table.fixed.values())
    assert runs_of(notebook, table) or table.fixed, "nothing changes, and nothing says why"


@pytest.mark.parametrize("number", PATHS)
def test_chapter_is_poke_proof(number: str) -> None:
    """One value of each constant, and three seeds; `make poke` takes all."""
    command = [sys.executable, str(ROOT / "tools" / "poke.py"), number, "--few", "--jobs", "1", "--json"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = child.stdout.splitlines()
    assert lines and lines[-1].startswith("["), f"{child.stdout[-2000:]}{child.stderr[-2000:]}"
    assert json.loads(lines[-1]) == [] and child.returncode == 0


def exercise() -> list[Any]:
    data = {"kvgather": {"exercise": "00.1"}}
    solution = "<summary>Solution</summary>\n```python\nanswer = SIZE\n```\n</details>"
    return [
        new_markdown_cell("### Exercise 00.1 — Size"),
        new_code_cell("answer = ...", metadata={"tags": ["exercise"], **data}),
        new_markdown_cell(solution),
        new_code_cell('check("00.1", answer)', metadata={"tags": ["check"], **data}),
    ]


CHECK = """
def check(name, answer):
    print("not yet: …" if answer is ... else "correct: …" if answer < 9 else "wrong: …")
"""
CELLS = ["SIZE, NAME = 4, 'a'\nLEVELS: tuple = (1, 2)", "import torch\ntorch.manual_seed(7)"]


def chapter(folder: Path, *sources: str, exercises: bool = False) -> Notebook:
    cells = [new_code_cell(source) for source in (CHECK, *CELLS, *sources)]
    path = folder / "00_small.ipynb"
    nbformat.write(new_notebook(cells=[*cells, *(exercise() if exercises else [])]), path)
    return Notebook.read(path)


def complaints(notebook: Notebook, **pokes: Any) -> list[str]:
    """What is said of a chapter with these values, each in a process of its own."""
    runs = [run for run in runs_of(notebook, Table(pokes, {})) if "seed" not in run.label]
    return [result.complaint for result in poke.perform_all([(run, notebook) for run in runs], jobs=2)]


def test_a_constant_is_replaced_wherever_it_is_assigned() -> None:
    assert with_constants(CELLS, {"SIZE": "12"})[0].startswith("SIZE, NAME = 12, 'a'\n")
    assert with_constants(CELLS, {"NAME": "'é'", "LEVELS": "()"})[0] == "SIZE, NAME = 4, 'é'\nLEVELS: tuple = ()"
    assert with_constants(["é = 'é'; A = [\n  1,\n  2,\n]  # two"], {"A": "0"}) == ("é = 'é'; A = 0  # two",)
    with pytest.raises(PokeError, match="no cell assigns NOTHING"):
        with_constants(CELLS, {"NOTHING": "1"})


def test_seeds_are_moved_and_stay_different() -> None:
    source = "SEED = 3\ng = Generator().manual_seed(1)\nr = random.Random(2); x = [manual_seed(SEED)]"
    moved = "SEED = 5\ng = Generator().manual_seed(7)\nr = random.Random(8); x = [manual_seed(SEED)]"
    assert with_seed(["seed(True)", source], 5) == ("seed(True)", moved)


def test_constants_are_names_in_capitals_with_written_values() -> None:
    source = "A, b = 1, 2\nC = [1, 'x']\nD = A + 1\nE = f(1)\nF: int = -3\nG = {'k': (None, 2.5)}\nimport H\n%magic"
    assert constants([source]) == ["A", "C", "F", "G"]


def test_runs_have_all_values_and_seeds(tmp_path: Path) -> None:
    table = Table({"SIZE": (5, Refused(0, "no")), "SIZE, NAME": ((1, "b"), (2, Source("str(1)")))}, {})
    notebook = chapter(tmp_path)
    labels = [run.label for run in runs_of(notebook, table)]
    assert labels[:4] == ["SIZE = 5", "SIZE = 0", "SIZE = 1, NAME = 'b'", "SIZE = 2, NAME = str(1)"]
    assert labels[4:] == [f"seed {seed}" for seed in range(10)]
    few = runs_of(notebook, table, few=True)
    assert [run.label for run in few] == ["SIZE = 5", "SIZE = 1, NAME = 'b'", "seed 0", "seed 1", "seed 2"]
    assert [run.refused for run in runs_of(notebook, table)][:2] == ["", "no"]


def test_a_good_chapter_has_no_complaint(tmp_path: Path) -> None:
    source = "import inspect\ndef double(x):\n    return 2 * x\nassert 'return' in inspect.getsource(double)"
    assert complaints(chapter(tmp_path, source, exercises=True), SIZE=(5, 6)) == ["", ""]


BAD = [
    ("1 / (SIZE - 5)", "cell 3 raised ZeroDivisionError: division by zero"),
    ("assert SIZE < 5", "cell 3 raised AssertionError"),
    ("import warnings\nwarnings.warn(f'{SIZE}')", "cell 3 printed to stderr"),
    ("import os\nos.write(2, b'x.py:1: UserWarning: old')", "printed past Python: x.py:1: UserWarning"),
    ("import os\nos._exit(3)", "the process ended with exit status 3"),
    ("SIZE.missing", "cell 3 raised AttributeError"),
    ("def check(name, answer): print('correct: …')", "the check says 'correct: …', not 'not yet: '"),
    ("SIZE = 9", "exercise 00.1: the check says 'wrong: …', not 'correct: '"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "said"), BAD, ids=lambda value: value[:30])
def test_a_bad_chapter_is_found(tmp_path: Path, source: str, said: str) -> None:
    (complaint,) = complaints(chapter(tmp_path, source, exercises=True), SIZE=(5,))
    assert said in complaint


REFUSALS = [
    ("raise ValueError(f'SIZE is {SIZE}; accepted: up to 4')", ""),
    ("import kvgather as kg\nkg.BlockPool(num_blocks=0, page_size=SIZE)", ""),
    ("raise ValueError(f'SIZE is {SIZE}; accepted: what is even')", "which does not say 'up to 4'"),
    ("raise RuntimeError(f'SIZE is {SIZE}; accepted: up to 4')", "which is not one of our errors"),
    ("int('accepted: up to 4')", "which is not one of our errors"),
    ("SIZE", "every cell ran, though the chapter should refuse with 'up to 4'"),
]


@pytest.mark.parametrize(("source", "said"), REFUSALS, ids=lambda value: value[:40])
def test_a_refused_value_needs_one_of_our_errors(tmp_path: Path, source: str, said: str) -> None:
    wanted = "accepted" if "kvgather" in source else "up to 4"
    (complaint,) = complaints(chapter(tmp_path, source), SIZE=(Refused(5, wanted),))
    assert (said in complaint) if said else complaint == ""


def test_a_run_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poke, "LIMIT", 2)
    assert complaints(chapter(tmp_path, "import time\ntime.sleep(60)"), SIZE=(5,)) == ["ran longer than 2 s"]


def test_the_command_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        poke.main(["77"])
    assert "chapters are 77; accepted: 00, 01" in capsys.readouterr().err


def test_a_run_is_a_plain_value() -> None:
    """It travels to a process that was not forked."""
    import pickle

    run = Run("00", "A = 1", ("A = 1",))
    assert pickle.loads(pickle.dumps(run)) == run
