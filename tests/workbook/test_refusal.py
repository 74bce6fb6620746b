"""A check of an answer that may refuse its arguments names the case, whether it refused or returned."""

from __future__ import annotations

import pytest

from kvgather.workbook.checks import Wrong
from kvgather.workbook.checks.refusal import must_refuse, must_return


def half(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd\nsecond line")
    return number // 2


def test_a_value_is_compared() -> None:
    must_return(2, half, 4, name="half of 4")
    with pytest.raises(Wrong, match=r"^half of 4: expected 3, got 2$"):
        must_return(3, half, 4, name="half of 4")


def test_a_refusal_instead_of_a_value_names_the_case() -> None:
    with pytest.raises(Wrong, match=r"^half of 3: expected 1, got ValueError: 3 is odd$"):
        must_return(1, half, 3, name="half of 3")


def test_another_exception_reaches_the_caller() -> None:
    with pytest.raises(TypeError):
        must_return(1, half, "3", name="half of a text")
    with pytest.raises(TypeError):
        must_refuse(lambda: 1 + "", name="a text")  # type: ignore[operator]


def test_a_value_instead_of_a_refusal_names_the_case() -> None:
    must_refuse(half, 3, name="half of 3")
    must_refuse(half, 4, name="half of 4", or_return=2)
    with pytest.raises(Wrong, match=r"^half of 4: expected a ValueError, got 2$"):
        must_refuse(half, 4, name="half of 4")
    with pytest.raises(Wrong, match=r"^half of 4: expected False or a ValueError, got 2$"):
        must_refuse(half, 4, name="half of 4", or_return=False)
