"""The widget of chapter 00: a changed scale and a changed block table change the picture, and the sentence says how."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import kvgather as kg
from kvgather.workbook.widgets.bent_picture import Bend, bend_picture, bent_pictures

BLOCK_IDS = [3, 0, 2]


@pytest.fixture(params=["NHD", "HND"])
def bend(request: pytest.FixtureRequest) -> Bend:
    scale = torch.tensor([0.3])
    options: dict[str, Any] = {"scale": "per-tensor", "k_scale": scale, "v_scale": scale, "device": "cpu"}
    cache = kg.PagedKVCache(4, 8, 1, 16, layout=request.param, **options)
    rows = torch.linspace(0.5, 2.0, 24)[:, None, None].expand(24, 1, 16)
    slots = torch.cat([torch.arange(8) + 8 * block_id for block_id in BLOCK_IDS])
    cache.write(rows, rows, slots)
    return Bend(cache, BLOCK_IDS, 0.3)


def test_the_right_scale_and_table_give_the_picture(bend: Bend) -> None:
    picture, sentence = bend.changed(0.3, 0, 3)
    assert sentence == "0 of 24 tokens are wrong"
    assert torch.allclose(picture[:, 0], torch.linspace(0.5, 2.0, 24), rtol=0.07)


def test_twice_the_scale_is_twice_the_picture(bend: Bend) -> None:
    picture, sentence = bend.changed(0.6, 0, 3)
    assert torch.allclose(picture, 2 * bend.changed(0.3, 0, 3)[0])
    assert sentence == "24 of 24 tokens are wrong, and nothing was raised"


def test_another_block_changes_its_tokens_alone(bend: Bend) -> None:
    picture, sentence = bend.changed(0.3, 1, 1)
    assert (picture[8:16] == 0).all() and (picture[:8] > 0).all() and (picture[16:] > 0).all()
    assert sentence == "8 of 24 tokens are wrong, and nothing was raised"


def test_a_block_past_the_end_is_nan_and_named(bend: Bend) -> None:
    picture, sentence = bend.changed(0.3, 2, 4)
    assert picture[16:].isnan().all() and not picture[:16].isnan().any()
    assert sentence.startswith("8 of 24 tokens are wrong; check: block_table[0, 2]")


def test_sliders_move_the_picture_and_the_sentence(bend: Bend) -> None:
    widget = bend_picture(bend)
    scale, (entry, block_id), sentence, picture = widget.children[0], widget.children[1].children, *widget.children[2:]
    assert (scale.value, entry.value, block_id.value) == (0.3, 0, 3)
    assert sentence.value == "0 of 24 tokens are wrong"
    seen = [bytes(picture.value)]
    scale.value = 1.2
    seen.append(bytes(picture.value))
    scale.value = 0.3
    entry.value = 2
    assert block_id.value == 2 and sentence.value == "0 of 24 tokens are wrong"
    block_id.value = block_id.max
    assert "check: block_table[0, 2]" in sentence.value
    seen.append(bytes(picture.value))
    assert all(value.startswith(b"\x89PNG") for value in seen) and len(set(seen)) == 3


def test_a_redraw_is_quick(bend: Bend) -> None:
    widget = bend_picture(bend)
    start = time.perf_counter()
    for value in range(5):
        widget.children[1].children[1].value = value
    assert (time.perf_counter() - start) / 5 < 1.0  # 0.1 s on two quiet cores


def test_a_panel_for_each_change(bend: Bend) -> None:
    drawing = bent_pictures(bend, [("one", 0.6, 0, 3), ("two", 0.3, 0, 1)])
    assert [axes.get_title(loc="left") for axes in drawing.axes] == ["one", "two"]
