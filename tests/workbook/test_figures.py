"""Figures reach the notebook as PNGs with an alt text."""

from __future__ import annotations

import base64
import io

import pytest
from matplotlib.colors import to_hex
from tqdm import tqdm

from kvgather.workbook import figures


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list:
    calls: list = []
    monkeypatch.setattr(figures, "display", lambda *args, **options: calls.append((args, options)))
    return calls


def colors_of(axes) -> list[str]:
    return [to_hex(patch.get_facecolor()).upper() for patch in axes.patches if patch.get_fill()]


def test_show_displays_a_png_with_its_alt_text(displayed):
    drawing, _ = figures.figure(2, 1)
    figures.show(drawing, alt="an empty plane")
    ((data,), options) = displayed[0]
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == "[figure: an empty plane]"
    assert options == {"metadata": {"image/png": {"alt": "an empty plane", "width": 192}}, "raw": True}


def test_show_asks_for_an_alt_text(displayed):
    with pytest.raises(ValueError, match="alt is empty; accepted: a sentence"):
        figures.show(figures.figure()[0], alt=" ")
    assert displayed == []


def test_show_closes_a_figure_of_pyplot(displayed):
    import matplotlib.pyplot as plt

    drawing = plt.figure()
    number = drawing.number
    figures.show(drawing, alt="an empty plane")
    assert number not in plt.get_fignums()


def test_the_same_figure_is_the_same_bytes():
    first, second = (figures.png(figures.grid_of_bytes(["K", None])) for _ in range(2))
    assert first == second


def test_boxes_are_colored_by_owner_and_marked():
    _, axes = figures.figure()
    used = figures.boxes(axes, ["A", None, "", "B", "A"], columns=2, labels=["x", "", "", "", ""], marked=[3])
    assert used == {"A": figures.PALETTE[0], "B": figures.PALETTE[1]}
    assert colors_of(axes) == [used["A"], figures.EMPTY, used["B"], used["A"]]
    assert [(patch.get_x(), patch.get_y()) for patch in axes.patches if not patch.get_fill()] == [(1.06, 1.06)]
    assert [text.get_text() for text in axes.texts] == ["x"]


def test_bytes_have_their_offset_beside_them():
    drawing = figures.grid_of_bytes(["K"] * 20, columns=8, first=64)
    assert [text.get_text() for text in drawing.axes[0].texts] == ["64", "72", "80"]


def test_a_block_in_two_tables_is_shared():
    drawing = figures.block_table_figure({"A": [3, 1], "B": [3, 0, 2]}, 5)
    pool, below = drawing.axes
    a, b, shared = figures.PALETTE[0], figures.PALETTE[1], figures.PALETTE[6]
    assert colors_of(pool) == [b, a, b, shared, figures.EMPTY]
    assert colors_of(below) == [shared, a, shared, b, b]
    assert [text.get_text() for text in drawing.axes[0].get_legend().get_texts()] == ["A", "B", "shared"]


def test_text_is_readable_on_every_color_of_the_palette():
    assert figures.text_color("#000000") == "white" and figures.text_color("#FFFFFF") == figures.INK
    assert figures.text_color(figures.PALETTE[0]) == "white" and figures.text_color(figures.PALETTE[6]) == figures.INK


@pytest.mark.parametrize("total", [None, 3])
def test_progress_yields_everything_and_fills_its_bar(monkeypatch, capsys, total):
    monkeypatch.setattr(figures, "tqdm", tqdm)  # the bar for terminals, on stderr
    items = range(3) if total is None else iter(range(3))
    assert list(figures.progress(items, "work", total)) == [0, 1, 2]
    assert capsys.readouterr().err.split("\r")[-1].startswith("work: 100%")


def test_a_figure_is_an_opaque_card_on_which_text_is_readable():
    """A transparent or a white figure would be unreadable, or dazzle, in JupyterLab's dark theme."""
    from matplotlib.image import imread

    drawing, axes = figures.figure(2, 1)
    axes.set(xticks=[], yticks=[])
    pixels = imread(io.BytesIO(figures.png(drawing)))
    assert pixels.shape[2] == 3 or (pixels[..., 3] == 1).all()
    assert to_hex(pixels[0, 0]).upper() == to_hex(pixels[len(pixels) // 2, 140]).upper() == figures.PAPER
    for color in (figures.INK, figures.LINE):
        assert contrast(color, figures.PAPER) >= 3
    assert contrast(figures.INK, figures.PAPER) >= 7


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colors as WCAG defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
