"""Pictures of the prefix path show the batch, the weights and the times that they are given."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from kvgather.attention.batch import PrefixBatch
from kvgather.blocks import cu_seqlens
from kvgather.workbook.crossing_picture import crossing_picture
from kvgather.workbook.damage_picture import damage_picture
from kvgather.workbook.figures import PALETTE, png
from kvgather.workbook.prefix_picture import CACHED, NEW, UNSEEN, gathered_picture, mask_picture
from kvgather.workbook.softmax_picture import shares_picture, sink_error_picture


def test_gathered_picture_puts_positions_into_their_slots() -> None:
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    batch = PrefixBatch.build(table, cu_seqlens([2]), cu_seqlens([6]), page_size=4, num_blocks=4)
    pool, below = gathered_picture(batch, columns=8).axes
    written = {(t.get_position()[0], t.get_position()[1]): t.get_text() for t in pool.texts if t.get_text().isdigit()}
    assert written == {
        (0.5, 1.5): "0", (1.5, 1.5): "1", (2.5, 1.5): "2", (3.5, 1.5): "3", (0.5, 0.5): "4", (1.5, 0.5): "5",
    }  # fmt: skip
    colors = [to_rgba(p.get_facecolor()) for p in below.patches]
    assert colors == [to_rgba(CACHED)] * 4 + [to_rgba(NEW)] * 2


def test_gathered_picture_wraps_a_long_sequence() -> None:
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    batch = PrefixBatch.build(table, cu_seqlens([2]), cu_seqlens([10]), page_size=4, num_blocks=3)
    pool, below = gathered_picture(batch, columns=8).axes
    assert [text.get_text() for text in below.texts if text.get_text().isdigit()] == [str(i) for i in range(10)]
    assert [round(axes.get_ylim()[0]) for axes in (pool, below)] == [2, 2]


def test_mask_picture_colours_what_has_weight() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    axes = mask_picture({"two of three": weights}).axes[0]
    colors = [to_rgba(p.get_facecolor()) for p in axes.patches if isinstance(p, Rectangle)]
    assert colors == [to_rgba(c) for c in (CACHED, NEW, UNSEEN, CACHED, NEW, NEW)]
    assert axes.get_title(loc="left") == "two of three"


def test_shares_picture_gives_the_sink_what_is_missing() -> None:
    drawing = shares_picture({"once": [0.5, 0.3], "none": [0.6, 0.4]})
    heights = [[round(p.get_height(), 6) for p in axes.patches if isinstance(p, Rectangle)] for axes in drawing.axes]
    assert heights == [[0.5, 0.3, 0.2], [0.6, 0.4]]
    assert [text.get_text() for axes in drawing.axes for text in axes.texts] == ["20%", "0%"]


def test_sink_error_picture_has_a_line_for_each_sink() -> None:
    axes = sink_error_picture({"a": {1: 0.0, 4: 0.5}, "b": {1: 0.0, 4: 0.1}}).axes[0]
    assert [list(map(float, np.atleast_1d(line.get_ydata()))) for line in axes.lines[:2]] == [[0.0, 0.5], [0.0, 0.1]]
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    assert [int(tick) for tick in axes.get_xticks()] == [1, 4]


def test_damage_picture_shares_the_colours() -> None:
    right, wrong = torch.tensor([[1.0, -3.0]]), torch.tensor([[9.0, 0.0]])
    drawing = damage_picture({"right": (right.softmax(1), right), "wrong": (wrong.softmax(1), wrong)})
    images = [axes.images[0] for axes in drawing.axes if axes.images]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1), (-3, 3), (-3, 3)]
    assert [axes.get_title(loc="left") for axes in drawing.axes[:2]] == ["right", "wrong"]


def test_crossing_picture_draws_paths_and_the_switch() -> None:
    lines = {"gather": {16: 400.0, 128: 900.0}, "direct": {128: 1200.0, 16: 200.0}}
    drawing = crossing_picture({"8,192 cached": lines}, {"8,192 cached": 32})
    drawn = drawing.axes[0].lines
    assert [list(map(float, np.atleast_1d(line.get_xdata()))) for line in drawn] == [[16, 128], [16, 128], [32, 32]]
    assert [list(map(float, np.atleast_1d(line.get_ydata()))) for line in drawn[:2]] == [[400, 900], [200, 1200]]
    assert drawn[0].get_color() == PALETTE[0]
    assert png(drawing).startswith(b"\x89PNG")
