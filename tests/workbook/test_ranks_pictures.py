"""Chapter 10's pictures: who holds which heads and pages, the merge, and the scaling of made-up rows."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from kvgather.bench.ranks import rows
from kvgather.workbook.dealt import deal
from kvgather.workbook.figures import PALETTE, png
from kvgather.workbook.rank_scale import gather_on_rank
from kvgather.workbook.ranks_picture import MergedRow, heads_picture, merge_picture, pages_picture
from kvgather.workbook.scaling_picture import read_scaling, scaling_alt, scaling_picture


def owned(axes: Axes, rank: int) -> list[tuple[int, int]]:
    """Row and column of the boxes in a rank's color."""
    color = to_rgba(PALETTE[rank])
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_fill()]
    return [(int(box.get_y()), int(box.get_x())) for box in boxes if box.get_facecolor() == color]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_heads_picture_gives_each_rank_its_columns() -> None:
    axes = heads_picture([range(2), range(2, 4)], q_heads=8).axes[0]
    assert owned(axes, 0) == [(row, column) for row in range(3) for column in (0, 1)]
    assert owned(axes, 1) == [(row, column) for row in range(3) for column in (2, 3)]
    assert labels(axes)[:8] == ["0–1", "2–3", "4–5", "6–7", "0", "1", "2", "3"]


def test_heads_picture_without_groups() -> None:
    assert labels(heads_picture([range(1), range(1, 2)], q_heads=2).axes[0])[:4] == ["0", "1", "0", "1"]


def test_pages_picture_colors_pages_by_rank_also_of_a_short_sequence() -> None:
    top, bottom = pages_picture(deal([9, 3], 4, 2), ["A", "B"], [9, 3], 4, 2).axes
    assert owned(top, 0) == [(0, 0), (0, 2), (1, 0)] and owned(top, 1) == [(0, 1)]
    assert labels(top) == ["0", "0", "1", "2", "sequence A", "sequence B"]
    assert labels(bottom) == ["A0", "A2", "B0", "A1", "pool of rank 0", "pool of rank 1"]
    assert owned(bottom, 1) == [(1, 0)]
    outlined = [(box.get_y(), box.get_x()) for box in top.patches if isinstance(box, Rectangle) and not box.get_fill()]
    assert [(int(y), int(x)) for y, x in outlined] == [(0, 2), (1, 0)]


def test_merge_picture_has_a_bar_of_all_weights_and_a_strip_for_each_rank() -> None:
    row = MergedRow([0.5, 0.0], 0.5, torch.tensor([[1.0, -2.0], [0.0, 0.0]]), torch.tensor([0.5, -1.0]))
    bar, strips, scale = merge_picture({"one": row}).axes
    assert [patch.get_width() for patch in bar.patches if isinstance(patch, Rectangle)] == [0.5, 0.0, 0.5]
    assert strips.images[0].get_array().tolist() == [[1.0, -2.0], [0.0, 0.0], [0.5, -1.0]]
    assert [label.get_text() for label in strips.get_yticklabels()] == ["rank 0 × 0.50", "rank 1 × 0.00", "merged"]
    assert scale.get_ylabel() == "output" and scale.get_ylim() == (-2.0, 2.0)


def test_the_trusting_gather_is_right_with_its_own_scale() -> None:
    codes, scale = torch.randn(3, 2, 2, 8), torch.rand(3, 2)
    got = gather_on_rank(codes, scale, torch.tensor([5, 0, 2]))
    expected = torch.stack(
        [codes[2, 1] * scale[2, :, None], codes[0, 0] * scale[0, :, None], codes[1, 0] * scale[1, :, None]]
    )
    assert torch.equal(got, expected)


def write(folder: Path, ranks: int, made: list[tuple[int, int, str, float | None, float | None]]) -> None:
    """A file of made-up rows: context, new, what, time in a graph, eager time."""
    read = []
    for context, new, what, graph, eager in made:
        received, least = (100, 90) if what == rows.TOGETHER else (None, None)
        times = {"graph_us": graph, "eager_us": eager, "bytes_received": received, "bytes_least": least}
        names = {"case": f"8q2x64-NHD-none-1seqs-{context}+{new}", "what": what, "link": "NVLink", "device": "GPU"}
        numbers = {"ranks": ranks, "context": context, "new": new, "samples": 9}
        versions = {"torch": "2.0", "nccl": "2.1", "date": "2026-01-01"}
        empty = {field.name: None if "None" in str(field.type) else "" for field in fields(rows.Row)}
        read.append(rows.Row(**{**empty, **times, **names, **numbers, **versions}))  # type: ignore[arg-type]
    rows.write(read, folder / f"parallel_gpu_x{ranks}.csv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    both = [(1000, 1, "one GPU", 80.0, 100.0), (1000, 1, "ideal", 40.0, 50.0), (1000, 1, "local attention", 41.0, None)]
    write(tmp_path, 2, [*both, (1000, 1, "context parallel", 50.0, 90.0), (9000, 1, "context parallel", None, 700.0)])
    write(tmp_path, 4, [(1000, 1, "one GPU", 84.0, 100.0), (1000, 1, "context parallel", 30.0, 60.0)])
    return tmp_path


def test_scaling_is_read_from_all_files(folder: Path) -> None:
    found = read_scaling(folder)
    assert [(case.context, case.ranks, case.us, case.one_us) for case in found] == [
        (1000, 2, 50.0, 80.0), (1000, 4, 30.0, 84.0), (9000, 2, 700.0, None),
    ]  # fmt: skip
    assert found[0].ideal_us == 40.0 and found[0].efficiency == 0.8 and found[2].efficiency is None
    assert found[0].layer == "8q2x64-NHD-none" and found[0].device == "GPU"
    assert found[0].about == "in a CUDA graph, NVLink, torch 2.0, NCCL 2.1, 2026-01-01"
    assert found[2].about == "eager, NVLink, torch 2.0, NCCL 2.1, 2026-01-01"
    assert [(case.eager_us, case.one_eager_us) for case in found] == [(90.0, 100.0), (60.0, 100.0), (700.0, None)]
    assert (found[0].received, found[0].least) == (100, 90)
    assert read_scaling(folder, "other_*.csv") == []


def test_scaling_picture_has_a_line_for_each_context_and_the_ideal(folder: Path) -> None:
    found = read_scaling(folder)
    drawing = scaling_picture(found)
    time, share = drawing.axes
    lines = [list(zip(*map(list, line.get_data()), strict=True)) for line in time.lines]
    ideals = [[(1, 80.0), (2, 40.0)], [(1, 84.0), (4, 21.0)]]
    assert lines == [*ideals, [(1, 80.0), (1, 84.0)], [(1, 80.0), (2, 50.0), (4, 30.0)], [(2, 700.0)]]
    assert list(share.lines[0].get_ydata()) == [0.8, 0.7]
    assert png(drawing).startswith(b"\x89PNG")
    assert scaling_alt(found).endswith(
        "The lowest efficiency is 70%, with 1 new token at 1,000 on 4 GPUs; the highest 80%, with 1 new token at 1,000 "
        "on 2 GPUs."
    )


def test_scaling_without_one_gpu_has_no_efficiency(folder: Path) -> None:
    found = read_scaling(folder)[2:]
    assert len(scaling_picture(found).axes[0].lines) == 1
    assert "efficiency is" not in scaling_alt(found)
