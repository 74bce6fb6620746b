"""The layout explorer says and draws what the layouts are."""

from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_hex

from kvgather.formats.layout import convert, key_shape
from kvgather.workbook.figures import BAD
from kvgather.workbook.layout_picture import (
    STRONG,
    PoolSizes,
    locate,
    page_bytes,
    place_picture,
    token_picture,
)
from kvgather.workbook.widgets.layout_explorer import layout_explorer


# By hand: block 1 begins at byte 1024, head 1 of HND and SHUFFLE 512 bytes on; SHUFFLE's pieces of K are 256 apart.
@pytest.mark.parametrize(
    ("layout", "which", "byte", "load", "brings"),
    [
        ("NHD", "key", 1024 + 5 * 64 + 32 + 20, 1392, "page_offset 5, dims 16 to 31"),
        ("HND", "value", 1024 + 512 + 5 * 32 + 20, 1712, "page_offset 5, dims 16 to 31"),
        ("SHUFFLE", "key", 1024 + 512 + 256 + 5 * 16 + 4, 1872, "page_offset 5, dims 16 to 31"),
        ("SHUFFLE", "value", 1024 + 512 + 20 * 16 + 5, 1856, "page_offsets 0 to 15, dim 20"),
    ],
)
def test_an_element_is_located(layout, which, byte, load, brings):
    place = locate(layout, which, 1, 1, 5, 20)
    assert (place.byte, place.load, len(place.together)) == (byte, load, 16)
    assert place.together[byte - load] == (1, 1, 5, 20)
    element, last = f"{which} of {layout}: block 1, head 1, page_offset 5, dim 20", load + 15
    assert str(place) == f"{element} → byte {byte}; its load is bytes {load} to {last}: {brings}"


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "SHUFFLE"])
def test_the_bytes_of_a_page_are_those_that_convert_moves(layout, which):
    # FP8 holds the integers to 16 exactly, so each coordinate is moved by itself, in two digits of base 16.
    shape = key_shape("NHD", 3, 16, 2, 32, 1)
    grids = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    for column, axis in ((0, 2), (1, 1), (2, 3)):
        high, low = (
            convert(digit.to(torch.float8_e4m3fn), "NHD", layout, which).flatten()[1024:2048].float()
            for digit in (grids[axis] // 16, grids[axis] % 16)
        )
        assert torch.equal(16 * high + low, page_bytes(layout, which, 1)[:, column].float())


def test_an_element_outside_the_pool_is_refused():
    with pytest.raises(ValueError, match="page_offset is 16; accepted: 0 to 15"):
        locate("NHD", "key", 0, 0, 16, 0)
    with pytest.raises(ValueError, match="layout is 'NDH'"):
        layout_explorer(layout="NDH")


def test_the_picture_marks_the_element_its_token_and_its_load():
    page, loads = place_picture(locate("SHUFFLE", "value", 1, 1, 5, 20)).axes
    marked = [to_hex(patch.get_facecolor()).upper() for patch in loads.patches if patch.get_fill()]
    assert len(marked) == 48 and marked[16 + 5] == BAD and marked.count(BAD) == 1
    assert [i for i, color in enumerate(marked) if color == STRONG[1]] == [5, 37]
    assert loads.texts[16 + 5].get_text() == "5, 20"
    outline = next(patch for patch in page.patches if not patch.get_fill())
    assert (outline.get_x(), outline.get_y(), outline.get_width()) == (0, (1856 - 1024) // 64, 16)


@pytest.mark.parametrize(("byte_of", "row"), [((0, 0, 0, 0), 0), ((2, 1, 15, 31), 2)])
def test_at_the_ends_of_the_pool_the_load_is_still_shown(byte_of, row):
    place = locate("NHD", "key", *byte_of)
    loads = place_picture(place).axes[1]
    marked = [to_hex(patch.get_facecolor()).upper() for patch in loads.patches if patch.get_fill()]
    assert marked.index(BAD) // 16 == row


def test_a_token_is_drawn_in_each_layout():
    panels = token_picture("key", head=1, page_offset=5).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["NHD", "HND", "SHUFFLE"]
    image = panels[2].images[0].get_array()
    strong = [(int(r), int(c)) for r, c in zip(*(abs(image - _rgb(STRONG[1])).sum(-1) < 1e-6).nonzero(), strict=True)]
    assert strong == [(9, c) for c in range(16, 32)] + [(13, c) for c in range(16, 32)]


def test_other_sizes_are_drawn():
    sizes = PoolSizes(blocks=2, page=32, heads=3, dim=48)
    place = locate("SHUFFLE", "value", 1, 2, 20, 40, sizes)
    # By hand: a block has 4608 bytes, a head 1536, a group of 16 tokens 768, a dim 16.
    assert place.byte == 4608 + 2 * 1536 + 768 + 40 * 16 + 4
    assert str(place).endswith("page_offsets 16 to 31, dim 40")
    page, _ = place_picture(place).axes
    assert page.images[0].get_array().shape == (36, 128, 3)  # more than 64 rows of 64 bytes
    panels = token_picture("key", head=2, page_offset=20, sizes=sizes).axes
    strong = [(abs(panel.images[0].get_array() - _rgb(STRONG[2])).sum(-1) < 1e-6).sum() for panel in panels]
    assert strong == [48, 48, 48]
    explorer = layout_explorer("NHD", "key", 1, 2, 31, 47, sizes)
    assert explorer.children[-2].value == str(locate("NHD", "key", 1, 2, 31, 47, sizes))


def test_sizes_that_no_picture_fits_are_refused():
    with pytest.raises(ValueError, match="page is 8; accepted: positive multiples of 16"):
        PoolSizes(page=8)
    with pytest.raises(ValueError, match="a block has 32768 bytes; accepted for a picture: up to 16384"):
        PoolSizes(page=64, heads=4, dim=128)


def _rgb(color: str) -> list[float]:
    from matplotlib.colors import to_rgb

    return list(to_rgb(color))


def test_the_widget_answers_to_its_controls():
    explorer = layout_explorer()
    assert "kvgather-layout-explorer" in explorer._dom_classes
    choices, first_row, second_row, sentence, picture = explorer.children
    layouts, pools = choices.children
    assert sentence.value == str(locate("SHUFFLE", "key", 1, 1, 5, 20))
    seen = {bytes(picture.value)}
    assert bytes(picture.value).startswith(b"\x89PNG")
    pools.value = "value"
    assert sentence.value == str(locate("SHUFFLE", "value", 1, 1, 5, 20))
    seen.add(bytes(picture.value))
    layouts.value = "NHD"
    for slider, value in zip((*first_row.children, *second_row.children), (2, 0, 15, 31), strict=True):
        slider.value = value
    assert sentence.value == str(locate("NHD", "value", 2, 0, 15, 31))
    seen.add(bytes(picture.value))
    assert len(seen) == 3
