"""A read far behind a scalar: the neighbours it lands in, the pictures, and the slider over the block id."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from matplotlib.patches import Rectangle

from kvgather.lab.crash_map import BLOCK_IDS, Point, bytes_behind
from kvgather.lab.fence import fenced
from kvgather.workbook.figures import png
from kvgather.workbook.neighbour_picture import Neighbours, in_bytes, map_picture, neighbour_picture, neighbours_of
from kvgather.workbook.widgets.far_read import describe_read, far_read

HEAP = Neighbours(page_end=1000, mapped=((0, 5000), (9000, 2**21)))


def point(block_id: int, outcome: str = "silent corruption", raised_by: str = "", blocking: int = 0) -> Point:
    return Point(block_id, bytes_behind(block_id), blocking, outcome, raised_by, "", "", "", 2**20 + 1)


def test_an_offset_is_in_the_scalar_its_page_mapped_memory_or_none():
    assert [HEAP.at(n) for n in (0, 3, 4, 999, 1000, 4999, 5000, 9000, 2**21)] == [
        "the scalar", "the scalar", "its page", "its page", "mapped", "mapped", "not mapped", "mapped", "not mapped",
    ]  # fmt: skip
    assert Neighbours(8, ()).at(8) == "unknown"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its mappings")
def test_a_fenced_scalar_has_no_readable_neighbour():
    inside = torch.zeros(mmap.PAGESIZE)
    assert neighbours_of(inside).at(4 * mmap.PAGESIZE - 1) in ("its page", "mapped")
    neighbours = neighbours_of(fenced(0.5))
    assert neighbours.page_end == 4
    assert [neighbours.at(n) for n in (0, 4, 2**25)] == ["the scalar", "not mapped", "not mapped"]


def test_sizes_in_words():
    words = ["1 byte", "512 bytes", "1.5 KiB", "2 MiB", "1 GiB"]
    assert [in_bytes(n) for n in (1, 512, 1536, 2**21, 2**30)] == words


def test_a_read_is_described():
    recorded = [point(4096, "illegal access", "the next call"), point(4096, "illegal access", "the gather", 1)]
    assert describe_read(4096, 8, 16, HEAP, recorded) == (
        "block 4,096 reads element 524,288, 2 MiB behind: on this CPU nothing is mapped there: a fault; "
        "recorded on a GPU: illegal access"
    )
    assert describe_read(2, 8, 16, HEAP) == (
        "block 2 reads element 256, 1 KiB behind: on this CPU that is mapped: garbage"
    )
    assert describe_read(1, 1, 16, HEAP).endswith("64 bytes behind: in the scalar's own page")
    assert describe_read(0, 8, 16, HEAP, recorded).endswith("0 bytes behind: that is the scalar itself")


def test_the_picture_has_a_mark_for_each_recorded_run_and_a_line_at_the_read():
    points = [point(1), point(4096, "illegal access", "the next call"), point(4096, "illegal access", "the gather", 1)]
    axes = neighbour_picture(2**21, HEAP, points).axes[0]
    marks, line = axes.lines[:2], axes.lines[2]
    assert [list(mark.get_xdata()) for mark in marks] == [[9.0], [21.0]]  # log2 of the bytes
    assert set(line.get_xdata()) == {21.0}
    assert "2 MiB behind" in [text.get_text() for text in axes.texts]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()][3:] == ["wrong values, no error", "fault"]
    assert png(neighbour_picture(0, Neighbours(64, ()))).startswith(b"\x89PNG")


def test_the_map_has_a_cell_for_each_run():
    points = [point(i, "illegal access", "the next call") if i == 4096 else point(i) for i in BLOCK_IDS]
    points += [point(i, "illegal access", "the gather", 1) if i == 4096 else point(i, "ok", "", 1) for i in BLOCK_IDS]
    drawing = map_picture(points)
    axes = drawing.axes[0]
    cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    words = [text.get_text() for text in axes.texts]
    assert len(cells) == 30 and words[:6] == ["wrong"] * 6
    assert (words[6], words[21], words[15]) == ("the\nnext\ncall", "the\ngather", "right")
    assert axes.get_xticklabels()[6].get_text() == "4,096\n2 MiB"
    assert png(drawing).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="points have the outcome 'timeout'; accepted: ok"):
        map_picture([point(1, "timeout")])


def test_the_slider_moves_the_sentence_and_the_picture():
    widget = far_read(points=[point(4096, "illegal access", "the next call")])
    ids, sizes, sentence, picture = widget.children
    assert sentence.value.startswith("block 4,096 reads element 524,288, 2 MiB behind")
    assert sentence.value.endswith("recorded on a GPU: illegal access")
    first = picture.value
    ids.value = 0
    assert sentence.value.startswith("block 0 reads element 0, 0 bytes behind") and picture.value != first
    ids.value, sizes.children[0].value, sizes.children[1].value = 2**20, 1, 64
    assert "256 MiB behind" in sentence.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_id": 3}, "block_id is 3; accepted: 0 or a power of two up to 1048576"),
        ({"heads": 3}, "heads is 3; accepted: 1 or a power of two up to 64"),
        ({"page_size": 128}, "page_size is 128"),
    ],
)
def test_values_that_the_sliders_do_not_have(arguments, message):
    with pytest.raises(ValueError, match=message):
        far_read(**arguments)
