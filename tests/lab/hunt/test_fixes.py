"""Every right fix is accepted, and no wrong one."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvgather.workbook import checks

pytestmark = pytest.mark.triton
hunt = pytest.importorskip("kvgather.lab.hunt", reason="needs Triton, which has no build for this machine")
fixes = importlib.import_module("tests.lab.hunt.fixes")

IMPORTS = "import torch\nimport triton\nimport triton.language as tl\n\n\n"
NUMBER = {name: f"11.{i}" for i, name in enumerate(hunt.BUGS, start=1)}


@pytest.fixture
def verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], str]:
    """What the check of a bug says to a cell's text."""
    count = itertools.count()

    def judge(name: str, cell: str) -> str:
        answers = loaded(tmp_path / f"cell_{next(count)}.py", cell)
        checks.check(NUMBER[name], (answers.argument, answers.line, answers.program), answers.fixed)
        said = capsys.readouterr()
        assert said.err == "" and said.out.count("\n") == 1
        return said.out.strip()

    return judge


def loaded(path: Path, cell: str) -> ModuleType:
    path.write_text(IMPORTS + cell)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(table: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}: {how}") for name, ways in table.items() for how, value in ways.items()
    ]


@pytest.mark.parametrize(("name", "change"), cases(fixes.RIGHT))
def test_a_right_fix_is_accepted(verdict: Callable[[str, str], str], name: str, change: Any) -> None:
    bug = hunt.BUGS[name]
    said = verdict(name, fixes.answered(bug, change))
    assert said == f"correct: {bug.family}; {bug.lesson}"


@pytest.mark.parametrize(("name", "wrong"), cases(fixes.WRONG))
def test_a_wrong_fix_is_caught(verdict: Callable[[str, str], str], name: str, wrong: Any) -> None:
    change, part = wrong
    said = verdict(name, fixes.answered(hunt.BUGS[name], change))
    assert said.startswith("wrong: ") and part in said


@pytest.mark.parametrize(("name", "launcher"), cases(fixes.LAUNCHERS))
def test_a_launcher_may_be_the_fix(verdict: Callable[[str, str], str], name: str, launcher: Any) -> None:
    source, part = launcher
    said = verdict(name, fixes.answered(hunt.BUGS[name]) + f"\n\n{source}\n\nfixed = launch\n")
    assert said.startswith("wrong: " if part else "correct: ") and part in said


ROWS_LAUNCHER = """
def launch(out, pool, table):
    (n, dim), page_size = out.shape, pool.shape[1]
    rows_kernel[(triton.cdiv(n, 16),)](out, pool, table, n, pool.stride(0), PAGE=page_size, DIM=dim, BLOCK=16)


fixed = launch
"""


@pytest.mark.parametrize("launcher", ["", ROWS_LAUNCHER], ids=["kernel", "launcher"])
@pytest.mark.parametrize(
    ("signature", "part"),
    [
        ("n, stride_block: tl.int64, PAGE", "`tl.int64` in the signature is a fix on a GPU, but"),
        ('n, stride_block: "i64", PAGE', "widen in the body, such as `block.to(tl.int64)`"),
        ("n: tl.int64, stride_block, PAGE", "now fix the kernel"),
        ("n, stride_block: tl.int32, PAGE", "now fix the kernel"),
    ],
)
def test_a_type_in_the_signature_is_not_checked(
    verdict: Callable[[str, str], str], signature: str, part: str, launcher: str
) -> None:
    cell = fixes.answered(hunt.BUGS["rows"], [("n, stride_block, PAGE", signature)])
    said = verdict("rows", cell + launcher)
    assert said.startswith("not yet: ") and part in said


def test_a_type_in_the_signature_does_not_hide_a_fix_in_the_body(verdict: Callable[[str, str], str]) -> None:
    signature = [("n, stride_block, PAGE", "n, stride_block: tl.int64, PAGE")]
    for table, start in ((fixes.RIGHT, "correct: "), (fixes.WRONG, "wrong: ")):
        change = next(iter(table["rows"].values()))
        change = change[0] if start == "wrong: " else change
        assert verdict("rows", fixes.answered(hunt.BUGS["rows"], [*signature, *change])).startswith(start)


@pytest.mark.parametrize("name", hunt.BUGS)
def test_each_bug_has_two_right_and_two_wrong_fixes(name: str) -> None:
    assert len(fixes.RIGHT[name]) >= 2 and len(fixes.WRONG[name]) >= 2


@pytest.mark.parametrize("name", hunt.BUGS)
def test_the_skeleton_is_not_yet_an_answer(verdict: Callable[[str, str], str], name: str) -> None:
    bug = hunt.BUGS[name]
    open_text = "not yet: find argument, line and program; then fix the kernel"
    assert verdict(name, fixes.skeleton(bug)) == open_text
    fixed = fixes.changed(fixes.skeleton(bug), next(iter(fixes.RIGHT[name].values())))
    assert verdict(name, fixed) == open_text
    place = "not yet: argument, line and program are right; now fix the kernel"
    assert verdict(name, fixes.answered(bug)) == place
    assert verdict(name, fixes.answered(bug).replace("):\n", "):  # nothing new\n")) == place
    assert fixes.skeleton(bug).count("\n") < 30, "a cell of the chapter"
