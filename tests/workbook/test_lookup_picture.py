"""The arrows of chapter 01: position, entry, block, page offset, slot."""

from __future__ import annotations

import pytest

from kvgather.workbook.figures import EMPTY
from kvgather.workbook.lookup_picture import lookup_picture
from tests.workbook.test_figures import colors_of


def texts_of(position: int, block_ids: list[int], page_size: int, num_blocks: int) -> list[str]:
    drawing = lookup_picture(position, block_ids, page_size, num_blocks)
    (axes,) = drawing.axes
    marked = [color for color in colors_of(axes) if color != EMPTY]
    assert len(marked) == 4  # one position, one entry, one block, one slot
    drawing.canvas.draw()
    return [text.get_text() for text in axes.texts]


def test_the_arrows_say_the_arithmetic() -> None:
    texts = texts_of(13, [0, 1, 2, 9], 4, 16)
    said = {"entry 13 // 4 = 3", "the entry says block 9", "page offset 13 % 4 = 1", "slot 9 · 4 + 1 = 37"}
    assert said <= set(texts)


@pytest.mark.parametrize("position", [0, 15])
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_first_and_the_last_position(position: int, page_size: int) -> None:
    block_ids = [5, *range(15)] if page_size == 1 else [5]
    entry, offset = divmod(position, page_size)
    block_id = block_ids[entry]
    assert f"slot {block_id} · {page_size} + {offset} = {block_id * page_size + offset}" in texts_of(
        position, block_ids, page_size, 16
    )


def test_a_position_or_a_block_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="position is 8; accepted: 0 to 7"):
        lookup_picture(8, [0, 1], 4, 2)
    with pytest.raises(ValueError, match="block_ids has 2; accepted: 0 to 1"):
        lookup_picture(5, [0, 2], 4, 2)
