"""Code that the notebooks show is the code that runs, without docstrings."""

import pytest

from kvgather.lab import before_fix
from kvgather.workbook.source import source_of


def outer(x: int) -> int:
    """Not shown.

    Neither is this.
    """
    y = x + 1
    if y > 3:
        y = 3
    return y


def test_docstrings_are_left_out() -> None:
    text = "def outer(x: int) -> int:\n    y = x + 1\n    if y > 3:\n        y = 3\n    return y"
    assert source_of(outer) == text


def test_a_part_is_dedented() -> None:
    assert source_of(outer, "if y", "y = 3") == "if y > 3:\n    y = 3"


def test_last_is_looked_for_from_first_on() -> None:
    assert source_of(outer, "return", "y") == "return y"


@pytest.mark.triton
def test_a_kernel_is_shown_without_its_wrapper() -> None:
    assert source_of(before_fix.gather_one_head_kernel, "scale_at", "scale_at").startswith("scale_at = (block")


def test_text_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="text is 'nowhere'; accepted: a part of a line"):
        source_of(outer, "nowhere")
