"""Pictures of loads and of speed show what they are given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvgather.bench.report import Row
from kvgather.workbook.figures import png
from kvgather.workbook.speed_picture import roofline_picture, steps_picture
from kvgather.workbook.warp_picture import warp_picture

CAST = Row(
    "steps", "SHUFFLE-1x64", "contiguous cast", 1.0, 2.0, 3.0, 9, 1000, 100.0, 1.0, 0.0, 0.0, "d", "", "t", "t", "", ""
)
ROWS = [
    replace(CAST, implementation="0 token per program", gb_per_s=20.0),
    replace(CAST, implementation="2 tile", gb_per_s=90.0),
    CAST,
    replace(CAST, implementation="contiguous copy", gb_per_s=110.0),
]


def test_a_warp_picture_counts_bytes_and_sectors() -> None:
    apart, together = np.arange(512, 1024, 16)[:, None], np.arange(2048, 2080)[:, None]
    together = np.append(together, [[-1]], axis=0)
    drawing = warp_picture({"apart": apart, "together": together}, 512, label="byte")
    titles = [axes.get_title(loc="left") for axes in drawing.axes]
    assert titles == ["apart\n32 bytes from 16 sectors", "together\n32 bytes from 1 sector"]
    colors = [np.asarray(axes.collections[0].get_array()).reshape(16, 32) for axes in drawing.axes]
    assert (colors[0] == 2).sum() == 32
    assert (colors[0] == 1).sum() == 512 - 32
    assert (colors[1][0] == 2).all()
    assert (colors[1][1:] == 0).all()


def test_steps_picture_has_bars_a_limit_and_predictions() -> None:
    drawing = steps_picture({"SHUFFLE": ROWS}, {"SHUFFLE": {"2 tile": 95.0}})
    axes = drawing.axes[0]
    assert [patch.get_width() for patch in axes.patches] == [20.0, 90.0]
    assert [text.get_text() for text in axes.texts] == ["20", "90"]
    lines = [list(map(float, np.atleast_1d(line.get_xdata()))) for line in axes.lines]
    assert lines == [[95.0], [100.0, 100.0]]


def test_roofline_picture_has_the_points_under_the_best_roof() -> None:
    rows = [replace(row, implementation="kvgather") for row in ROWS[:2]]
    rows += [CAST, replace(CAST, gb_per_s=105.0), replace(CAST, bytes=5000, gb_per_s=120.0)]
    drawing = roofline_picture({"here": rows, "one size": [CAST, *rows[:2]]})
    roof, points = drawing.axes[0].lines
    assert [list(map(float, d)) for d in roof.get_data()] == [[1000.0, 5000.0], [105.0, 120.0]]
    assert list(map(float, np.asarray(points.get_ydata()))) == [20.0, 90.0]
    assert len(np.asarray(drawing.axes[1].lines[0].get_xdata())) == 2
    assert png(drawing).startswith(b"\x89PNG")


def test_roofline_picture_draws_the_spread() -> None:
    row = replace(ROWS[0], implementation="kvgather", bytes=1000, p20_us=0.1, p50_us=0.2, p80_us=0.5)
    points, bar, *_ = roofline_picture({"here": [row]}, spread=True).axes[0].lines
    assert list(map(float, np.asarray(points.get_ydata()))) == [5.0]
    assert list(map(float, np.asarray(bar.get_ydata()))) == [2.0, 10.0]
