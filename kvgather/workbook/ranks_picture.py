"""Chapter 10: who holds which heads, who holds which pages, and the merge of the ranks' partial states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from .figures import EMPTY, INK, PALETTE, boxes, figure, legend

__all__ = ["MergedRow", "heads_picture", "merge_picture", "pages_picture"]

SINK = "#8A8A85"


def rank_colors(ranks: int) -> dict[str, str]:
    """The color of each rank."""
    return {f"rank {rank}": PALETTE[rank % len(PALETTE)] for rank in range(ranks)}


def heads_picture(heads: Sequence[range], q_heads: int) -> Figure:
    """The query heads, the KV heads and the scales of each rank: a column for each KV head.

    Args:
        heads: KV heads of each rank.
        q_heads: query heads of the layer.
    """
    columns = sum(map(len, heads))
    group = q_heads // columns
    owner = {head: f"rank {rank}" for rank, own in enumerate(heads) for head in own}
    first = [f"{head * group}–{(head + 1) * group - 1}" if group > 1 else str(head) for head in range(columns)]
    labels = [*first, *map(str, range(columns)), *(f"[:, {head}]" for head in range(columns))]
    cell = min(0.62, 8.0 / columns)
    drawing, axes = figure(2.4 + cell * columns, 0.6 + 3 * cell)
    names = ["query heads", "KV heads", "scale, per-page-head"]
    owners = [owner[head] for head in range(columns)]
    colors = rank_colors(len(heads))
    boxes(axes, owners * 3, columns=columns, labels=labels, colors=colors, row_labels=names)
    legend(axes, colors)
    axes.set_xlim(-1.9 / cell, columns + 0.05)
    return drawing


def pages_picture(table: Tensor, names: Sequence[str], total: Sequence[int], page: int, ranks: int) -> Figure:
    """The pages of each sequence, colored by the rank that has them, above the pool of each rank.

    Args:
        table: `[batch, columns]`, a block id of the pool of rank column % ranks.
        names: of the sequences.
        total: tokens of each sequence; the page of the last one has a thick outline.
        page: tokens of a block.
        ranks: number of ranks.
    """
    pages = [-(-tokens // page) for tokens in total]
    blocks = max(1, int(table.max()) + 1)
    width = max(blocks, *pages)
    colors = rank_colors(ranks)
    above: list[str | None] = []
    labels: list[str] = []
    pools: list[list[str]] = [[""] * blocks for _ in range(ranks)]
    for sequence, (name, count) in enumerate(zip(names, pages, strict=True)):
        for column in range(width):
            above.append(f"rank {column % ranks}" if column < count else "")
            labels.append(str(int(table[sequence, column])) if column < count else "")
            if column < count:
                pools[column % ranks][int(table[sequence, column])] = f"{name}{column}"
    last = [sequence * width + count - 1 for sequence, count in enumerate(pages) if count]
    below: list[str | None] = []
    texts: list[str] = []
    for rank, pool in enumerate(pools):
        below += [f"rank {rank}" if text else None for text in pool] + [""] * (width - blocks)
        texts += pool + [""] * (width - blocks)
    cell = min(0.46, 9.0 / (width + 3))
    size = (cell * (width + 3.4), 0.85 + cell * (len(pages) + ranks))
    drawing, (top, bottom) = figure(*size, rows=2, height_ratios=[len(pages), ranks])
    rows = [f"sequence {name}" for name in names]
    boxes(top, above, columns=width, labels=labels, colors=colors, marked=last, row_labels=rows)
    legend(top, colors)
    pool_rows = [f"pool of rank {rank}" for rank in range(ranks)]
    boxes(bottom, below, columns=width, labels=texts, colors=colors, row_labels=pool_rows)
    for axes in (top, bottom):
        axes.set_xlim(-3.2, width + 0.05)
    return drawing


@dataclass(frozen=True)
class MergedRow:
    """One row of attention, of one head.

    Attributes:
        weights: of each rank, `exp(lse of the rank - lse of all)`.
        sink: the sink's share.
        outs: `[ranks, dim]`, the output of each rank.
        out: `[dim]`, the merged output.
    """

    weights: Sequence[float]
    sink: float
    outs: Tensor
    out: Tensor


def merge_picture(rows: Mapping[str, MergedRow]) -> Figure:
    """A panel for each row: the weights of the ranks and the sink as one bar, above the outputs as colored strips.

    Green is positive, purple negative, white 0, by one scale for all strips.

    Args:
        rows: by title.
    """
    ranks = len(next(iter(rows.values())).weights)
    colors = rank_colors(ranks)
    top = max(float(row.outs.abs().max()) for row in rows.values()) or 1.0
    size = (10.5, 1.9 + 0.34 * (ranks + 1))
    drawing, grid = figure(*size, rows=2, columns=len(rows), squeeze=False, height_ratios=[1.0, 0.75 * (ranks + 1)])
    for place, (title, row) in enumerate(rows.items()):
        bar, strips = grid[0][place], grid[1][place]
        left = 0.0
        for rank, weight in enumerate(row.weights):
            bar.barh(0, weight, left=left, color=colors[f"rank {rank}"], height=0.8)
            left += weight
        bar.barh(0, row.sink, left=left, color=SINK, hatch="//", edgecolor="white", height=0.8)
        bar.set(xlim=(0, 1), ylim=(-0.5, 0.5), yticks=[], title=title)
        bar.set_xticks([0, 0.5, 1], ["0", "50%", "100%"], fontsize=8)
        picture: Any = {"cmap": "PRGn", "vmin": -top, "vmax": top, "aspect": "auto", "interpolation": "nearest"}
        values = [*row.outs.tolist(), row.out.tolist()]
        image = strips.imshow(values, **picture)
        names = [f"rank {rank} × {weight:.2f}" for rank, weight in enumerate(row.weights)]
        strips.set_yticks(range(ranks + 1), [*names, "merged"], fontsize=9)
        strips.axhline(ranks - 0.5, color=INK, linewidth=1.2)
        for rank in range(ranks - 1):
            strips.axhline(rank + 0.5, color="white", linewidth=1.5)
        strips.set_xticks([0, len(values[0]) - 1])
        strips.tick_params(length=0)
        strips.set_xlabel("dim")
    drawing.colorbar(image, ax=list(grid[1]), label="output", pad=0.01)
    handles = [*colors.items(), ("sink", SINK)]
    patches = [_patch(color, name == "sink") for name, color in handles]
    drawing.legend(patches, [name for name, _ in handles], loc="outside upper left", ncols=ranks + 1, fontsize=9)
    return drawing


def _patch(color: str, hatched: bool) -> Patch:
    return Patch(facecolor=color, hatch="//" if hatched else None, edgecolor="white" if hatched else EMPTY)
