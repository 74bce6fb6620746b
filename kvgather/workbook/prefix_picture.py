"""Pictures of a prefix hit: the slots of the gathered rows, and the keys that each new token sees."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..attention.batch import PrefixBatch
from .figures import EMPTY, INK, PALETTE, boxes, figure, legend

__all__ = ["gathered_picture", "mask_picture"]

CACHED, NEW, UNSEEN = PALETTE[0], PALETTE[1], EMPTY


def gathered_picture(batch: PrefixBatch, sequence: int = 0, *, columns: int = 32) -> Figure:
    """The pool's slots with the positions of one sequence, above the rows that its gather returns.

    Args:
        batch: a batch on any device.
        sequence: index of the sequence in the batch.
        columns: slots in a row of the pool.
    """
    page, total = batch.page_size, int(batch.lens_k[sequence])
    cached = total - int(batch.lens_q[sequence])
    table = batch.block_table[sequence].tolist()
    owners: list[str | None] = [None] * (batch.num_blocks * page)
    labels = [""] * len(owners)
    gathered = ["cached" if position < cached else "new" for position in range(total)]
    for position, owner in enumerate(gathered):
        slot = table[position // page] * page + position % page
        owners[slot], labels[slot] = owner, str(position)
    rows, below_rows = -(-len(owners) // columns), -(-total // columns)
    colors = {"cached": CACHED, "new": NEW}
    size = (10.5, 0.95 + 0.31 * (rows + below_rows))
    drawing, (pool, below) = figure(*size, rows=2, height_ratios=[rows, below_rows])
    names = [f"slots {row * columns}…" for row in range(rows)]
    boxes(pool, owners, columns=columns, labels=labels, colors=colors, row_labels=names)
    legend(pool, colors | {"not of this sequence": EMPTY})
    positions = [str(position) for position in range(total)]
    boxes(below, gathered, columns=columns, labels=positions, colors=colors, row_labels=["gathered"])
    for axes in (pool, below):
        axes.set_xlim(-3.4, columns + 0.05)
    for slot in range(0, len(owners) + 1, page):  # the edges of blocks
        row, x = divmod(slot, columns)
        if slot < len(owners):
            pool.plot([x, x], [row, row + 1], color=INK, linewidth=0.8)
        if row and x == 0:
            pool.plot([columns, columns], [row - 1, row], color=INK, linewidth=0.8)
    return drawing


def mask_picture(panels: Mapping[str, Tensor]) -> Figure:
    """The visible keys of each new token: a matrix for each panel, with a row for each new token.

    Args:
        panels: softmax weights `[new, keys]` by title; a key is visible if its weight is above 0.
    """
    widths = [max(weights.shape[1], 5) for weights in panels.values()]
    tallest = max(weights.shape[0] for weights in panels.values())
    width = 11.0
    cell = (width - 0.55 * len(panels)) / sum(widths)
    drawing, grid = figure(width, 1.1 + cell * tallest, columns=len(panels), squeeze=False, width_ratios=widths)
    for (title, weights), axes in zip(panels.items(), grid[0], strict=True):
        new, keys = weights.shape
        visible = (weights > 0).tolist()
        for row in range(new):
            for key in range(keys):
                color = UNSEEN if not visible[row][key] else CACHED if key < keys - new else NEW
                axes.add_patch(Rectangle((key, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.8))
        axes.set(xlim=(-0.05, max(keys, 5) + 0.05), ylim=(tallest + 0.05, -0.05), aspect="equal", anchor="NW")
        marks = sorted({0, keys - new, keys - 1})
        marks = [mark for mark in marks if mark in (0, keys - 1) or 2 < mark < keys - 3]
        axes.set_xticks([mark + 0.5 for mark in marks], [str(mark) for mark in marks], fontsize=8)
        ends = sorted({0, new - 1})
        axes.set_yticks([row + 0.5 for row in ends], [str(row) for row in ends], fontsize=8)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, pad=1)
        axes.set_title(title, fontsize=9.5, pad=6)
        for spine in axes.spines.values():
            spine.set_visible(False)
    names = {"sees a cached key": CACHED, "sees a new key": NEW, "does not see": UNSEEN}
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color in names.values()]
    drawing.legend(handles, list(names), loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    drawing.supylabel("new token", fontsize=9)
    drawing.supxlabel("columns: the key's position in its sequence", fontsize=9)
    return drawing
