"""Chapter 01: the way from a position of a sequence to a slot of the pool, with arrows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvgather.workbook.figures import BAD, EMPTY, INK, PALETTE, PAPER, figure, text_color

__all__ = ["lookup_picture"]

SEQUENCE, TABLE, BLOCK = PALETTE[4], PALETTE[1], PALETTE[0]


def lookup_picture(position: int, block_ids: Sequence[int], page_size: int, num_blocks: int) -> Figure:
    """Position → entry of the block table → block of the pool → page offset → slot.

    Args:
        position: position in the sequence.
        block_ids: block table of the sequence, one block id for each page.
        page_size: tokens of a block.
        num_blocks: blocks of the pool.

    Raises:
        ValueError: the position is past the table's end, or its block is not in the pool.
    """
    if not 0 <= position < len(block_ids) * page_size:
        raise ValueError(f"position is {position}; accepted: 0 to {len(block_ids) * page_size - 1}")
    entry, page_offset = divmod(position, page_size)
    block_id = block_ids[entry]
    if not 0 <= block_id < num_blocks:
        raise ValueError(f"block_ids has {block_id}; accepted: 0 to {num_blocks - 1}")
    length = len(block_ids) * page_size
    width = max(length, num_blocks)
    drawing, axes = figure(max(7.5, 0.42 * width + 1.9), 5.2)
    rows = {"sequence": 0.0, "table": 2.4, "pool": 4.8, "block": 7.2}
    _row(axes, rows["sequence"], range(length), 0.0, SEQUENCE, position)
    _row(axes, rows["table"], block_ids, 0.0, TABLE, entry, step=page_size)
    _row(axes, rows["pool"], range(num_blocks), 0.0, BLOCK, block_id)
    start = min(max(block_id + 0.5 - page_size / 2, 0), width - page_size)
    slots = range(block_id * page_size, (block_id + 1) * page_size)
    _row(axes, rows["block"], slots, start, BLOCK, page_offset)
    for name, text in (
        ("sequence", "positions of\nthe sequence"),
        ("table", "its block\ntable"),
        ("pool", "blocks of\nthe pool"),
        ("block", f"slots of\nblock {block_id}"),
    ):
        axes.text(-0.4, rows[name] + 0.5, text, ha="right", va="center", fontsize=9)
    middle_of_entry = entry * page_size + page_size / 2
    _arrow(axes, position + 0.5, 1, middle_of_entry, 2.4, f"entry {position} // {page_size} = {entry}")
    _arrow(axes, middle_of_entry, 3.4, block_id + 0.5, 4.8, f"the entry says block {block_id}")
    offset = f"page offset {position} % {page_size} = {page_offset}"
    _arrow(axes, block_id + 0.5, 5.8, start + page_offset + 0.5, 7.2, offset)
    slot = block_id * page_size + page_offset
    sum_of = f"slot {block_id} · {page_size} + {page_offset} = {slot}"
    axes.text(start + page_offset + 0.5, 8.55, sum_of, ha="center", va="center", fontsize=10, fontweight="bold")
    axes.set(xlim=(-2.9, width + 1.4), ylim=(8.9, -0.1))
    axes.set_axis_off()
    return drawing


def _row(
    axes: Axes, top: float, numbers: Sequence[int], left: float, color: str, marked: int, step: float = 1.0
) -> None:
    """A row of numbered boxes, `step` wide; the marked one in its strong color."""
    for index, number in enumerate(numbers):
        fill = color if index == marked else EMPTY
        axes.add_patch(Rectangle((left + index * step, top), step, 1, facecolor=fill, edgecolor=PAPER, linewidth=1.2))
        style: Any = {"ha": "center", "va": "center", "fontsize": 9, "color": text_color(fill)}
        if index == marked:
            style["fontweight"] = "bold"
        axes.text(left + (index + 0.5) * step, top + 0.5, str(number), **style)


def _arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float, text: str) -> None:
    arrow: Any = {"arrowstyle": "-|>", "color": BAD, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 1}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops=arrow)
    # On the side to which the arrow does not lean, clear of it.
    right = (x + to_x) / 2 + 0.3 + max(0.0, x - to_x) / 6
    axes.text(right, (y + to_y) / 2, text, ha="left", va="center", fontsize=9, color=INK)
