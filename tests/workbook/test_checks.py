"""A check prints one verdict, whatever the reader hands in."""

from __future__ import annotations

import math

import pytest
import torch

from kvgather.workbook import checks
from kvgather.workbook.checks import check, exercise, exercises, expect, first_difference
from kvgather.workbook.checks.compare import first_difference as compared

NAN = math.nan


@pytest.fixture(autouse=True)
def _two_exercises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_REGISTRY", {})

    @exercise("99.1", correct="it doubles")
    def double(answer):
        expect([2, 4], [answer(1), answer(2)], "double of 1 and 2")

    @exercise("99.2", not_yet="give two numbers")
    def ordered(first, second):
        return None if first < second else f"{first} is not below {second}"


def verdict(capsys: pytest.CaptureFixture[str], name: str, *answers: object) -> str:
    check(name, *answers)
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("\n") == 1
    return said.out.strip()


def raises(number):
    raise KeyError(f"no {number}\nand a second line")


def forgets(number):
    number * 2


@pytest.mark.parametrize("unfilled", [None, ..., NotImplemented, lambda _: ..., lambda _: NotImplemented])
def test_a_skeleton_is_not_yet_an_answer(capsys, unfilled):
    assert verdict(capsys, "99.1", unfilled) == "not yet: the skeleton is unchanged; fill it in"


def test_not_yet_says_what_to_do(capsys):
    assert verdict(capsys, "99.2", 1, ...) == "not yet: give two numbers"
    assert verdict(capsys, "99.1", forgets) == "not yet: forgets returned None; does it end with a return?"


def test_right_and_wrong(capsys):
    assert verdict(capsys, "99.1", lambda number: 2 * number) == "correct: it doubles"
    assert verdict(capsys, "99.1", lambda number: number**2 + 1) == (
        "wrong: double of 1 and 2: answer[1]: expected 4, got 5"
    )
    assert verdict(capsys, "99.2", 1, 2) == "correct: well done"
    assert verdict(capsys, "99.2", 2, 1) == "wrong: 2 is not below 1"


def test_an_exception_is_a_verdict_of_one_line(capsys):
    assert verdict(capsys, "99.1", raises) == "wrong: your code raised KeyError: 'no 1\\nand a second line'"
    assert verdict(capsys, "99.1", 7).startswith("wrong: your code raised TypeError: 'int' object is not callable")


def test_an_exception_names_the_line_of_the_cell(capsys):
    import linecache

    source = "def half(number):\n    return number / 0\n"
    linecache.cache["/tmp/ipykernel_1/2.py"] = (len(source), None, source.splitlines(True), "/tmp/ipykernel_1/2.py")
    names: dict = {}
    exec(compile(source, "/tmp/ipykernel_1/2.py", "exec"), names)
    said = verdict(capsys, "99.1", names["half"])
    assert (
        said == "wrong: your code raised ZeroDivisionError: division by zero, on line 2 of your cell: return number / 0"
    )


def test_an_unknown_exercise_names_those_there_are():
    with pytest.raises(ValueError, match=r"name is '99\.3'; accepted in this chapter: 99\.1, 99\.2"):
        check("99.3", 1)
    with pytest.raises(ValueError, match="nothing, it has no checks"):
        check("98.1", 1)


def test_a_broken_check_module_is_not_taken_for_a_missing_one(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="numby")

    monkeypatch.setattr(checks.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        exercises("99")


FP8 = torch.tensor([1.0, 2.0, NAN]).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN])),
        (FP8, FP8.clone()),
        (torch.tensor([True, False]), torch.tensor([True, False])),
        (torch.empty(0, 3), torch.empty(0, 3)),
        ([1, (2, NAN)], ([1, [2, NAN]])),
        ([1, 2], torch.tensor([1, 2])),
        (3, torch.tensor(3)),
        (3, 3.0),
        ({"a": [1]}, {"a": [1]}),
        ("x", "x"),
    ],
)
def test_equal_values_have_no_difference(expected, got):
    assert first_difference(expected, got) is None


@pytest.mark.parametrize(
    ("expected", "got", "said"),
    [
        (
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            torch.tensor([[1.0, 2.0], [NAN, 5.0]]),
            "answer[1, 0]: expected 3, got nan (2 of 4 differ)",
        ),
        (FP8, torch.tensor([1.0, 4.0, NAN]).to(torch.float8_e4m3fn), "answer[1]: expected 2, got 4 (1 of 3 differ)"),
        (torch.zeros(2, 3), torch.zeros(3, 2), "expected shape [2, 3], got [3, 2]"),
        (torch.zeros(2), torch.zeros(2).half(), "expected dtype torch.float32, got torch.float16"),
        (torch.zeros(2), [0.0, 0.0], "expected a tensor of shape [2], got a list, [0.0, 0.0]"),
        (torch.tensor(2**60 + 1), torch.tensor(2**60), "expected 1152921504606846977, got 1152921504606846976"),
        ([1, 2, 3], [1, 2], "expected 3 values, got 2"),
        ([1, [2, 3]], [1, [2, 4]], "answer[1][1]: expected 3, got 4"),
        ([1], "1", "expected 1 values, got a str, '1'"),
        ({"a": 1}, {}, "the key 'a' is missing"),
        ({}, {"a": 1}, "the key 'a' is unexpected"),
        ({"a": [1]}, {"a": [2]}, "answer['a'][0]: expected 1, got 2"),
        (1, True, "expected 1, got a bool, True"),
        (True, 1, "expected True, got 1"),
        (0.5, NAN, "expected 0.5, got nan"),
        (1, object(), "expected 1, got an object"),
        (1, torch.zeros(2), "expected 1, got a tensor of shape [2]"),
    ],
)
def test_the_first_difference_is_said(expected, got, said):
    assert said in str(compared(expected, got))


def test_a_tolerance_is_relative_above_one():
    assert first_difference(100.0, 100.9, tolerance=0.01) is None
    assert first_difference(100.0, 101.1, tolerance=0.01) is not None
    assert first_difference(torch.tensor([0.0]), torch.tensor([0.009]), tolerance=0.01) is None
    assert first_difference(torch.tensor([0.0]), torch.tensor([0.011]), tolerance=0.01) is not None
