"""Pictures of accesses and of outcomes say what the trace and the table say."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from kvgather.lab.trace import Access, Trace
from kvgather.workbook.access_picture import page_picture, scale_picture, sectors
from kvgather.workbook.figures import BAD, GOOD
from kvgather.workbook.outcome_picture import outcome_picture


def access(argument: str, elements: list[int], size: int) -> Access:
    at = np.array(elements, np.int64)
    on = np.ones(len(at), bool)
    return Access("k", 0, (0, 0), "load", argument, "f.py", 1, at, 1, at, on, at >= size, size)


def test_sectors_are_counted_once() -> None:
    assert sectors(np.array([0, 31, 32, 95])).tolist() == [0, 1, 2]


def test_page_picture_counts_what_moves() -> None:
    trace = Trace([access("key_cache_ptr", [130, 131], 256), access("value_cache_ptr", [128, 160, 192], 256)])
    titles = [axes.get_title(loc="left") for axes in page_picture({"NHD": trace}, (0, 0), 128).axes]
    assert titles == ["K in NHD: 2 bytes used, 32 moved", "V in NHD: 3 bytes used, 96 moved"]


def test_scale_picture_tells_inside_from_outside() -> None:
    trace = Trace([access("k_scale_ptr", [1, 5, 7], 4)])
    axes = scale_picture(trace, "k_scale_ptr", num_blocks=2, num_heads=2, page_size=2).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    names = ["exists (4)", "does not exist", "• read, inside (1)", "× read, outside (2)"]
    assert [text.get_text() for text in legend.get_texts()] == names
    drawn = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    red = [patch.get_xy() for patch in drawn if patch.get_facecolor() == to_rgba(BAD)]
    assert red == [(1, 1), (3, 1)]
    assert sum(patch.get_facecolor() == to_rgba(GOOD) for patch in drawn) == 4


def test_outcome_picture_has_a_cell_for_each_case() -> None:
    words = {("before", "a", "NHD"): "outside", ("before", "b", "NHD"): "wrong values"}
    axes = outcome_picture(words, ["before"], ["a", "b"], ["NHD"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["outside", "wrong"]


def test_outcome_picture_refuses_an_unknown_word() -> None:
    with pytest.raises(ValueError, match="outcomes has 'fine'; accepted: exact, wrong values, outside, refused"):
        outcome_picture({("before", "a", "NHD"): "fine"}, ["before"], ["a"], ["NHD"])


def test_the_picture_of_the_hunt_has_a_dot_for_each_bug_and_tool():
    from kvgather.workbook.hunt_picture import hunt_picture

    said = {"slots": {"oracle": "", "report": "element 21"}, "write": {"oracle": "pool[15]", "report": ""}}
    (axes,) = hunt_picture(said).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["oracle\n1 of 2", "report\n1 of 2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1  slots", "2  write"]
    sizes = {tuple(dots.get_offsets()[0]): dots.get_sizes()[0] for dots in axes.collections}
    assert sizes[0, 0] < sizes[1, 0] == sizes[0, 1] and sizes[1, 1] == sizes[0, 0]
