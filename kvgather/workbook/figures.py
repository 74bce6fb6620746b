"""House style of the workbook's figures: PNG with an alt text, readable without color."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm.auto import tqdm

__all__ = [
    "BAD",
    "EMPTY",
    "GOOD",
    "INK",
    "PALETTE",
    "PAPER",
    "block_table_figure",
    "boxes",
    "figure",
    "grid_of_bytes",
    "legend",
    "png",
    "progress",
    "show",
    "text_color",
]

# Okabe and Ito's palette without its black: distinct for color-blind readers and in gray print.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GOOD, BAD, EMPTY, INK, LINE = PALETTE[2], PALETTE[5], "#E2E1DA", "#222222", "#8A8A85"
# An opaque card: it does not dazzle on a dark page, stands out on a white one, and its text keeps the same contrast.
PAPER = "#F4F3EE"

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.grid": False,
    "grid.color": "#D6D5CD",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.1,
    "savefig.facecolor": PAPER,
}
matplotlib.rcParams.update(STYLE)

DPI = 140
Item = TypeVar("Item")


def figure(
    width: float = 8.0, height: float = 3.0, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes (one, or an array of them) in the house style, without pyplot.

    Args:
        width, height: size in inches.
        rows, columns: size of the grid of axes.
        options: arguments of `Figure.subplots`.
    """
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, **options)


def png(drawing: Figure, dpi: int = DPI) -> bytes:
    """The figure as the bytes of a PNG file. A widget that redraws takes fewer dots per inch, which is faster."""
    buffer = io.BytesIO()
    drawing.set_dpi(dpi)
    # `savefig` draws twice, the first time for the layout alone, which this call does before it draws.
    # Without the software's name and version in the file, the same figure gives the same bytes everywhere.
    packing = {"compress_level": 1 if dpi < DPI else 6}  # a widget's picture is not stored
    FigureCanvasAgg(drawing).print_png(buffer, metadata={"Software": None}, pil_kwargs=packing)
    return buffer.getvalue()


def show(drawing: Figure, alt: str) -> None:
    """Display a figure as a PNG that carries an alt text, and close it.

    Args:
        drawing: a matplotlib figure.
        alt: a sentence that describes the picture, for readers who cannot see it.

    Raises:
        ValueError: the alt text is empty.
    """
    if not alt.strip():
        raise ValueError("alt is empty; accepted: a sentence that says what the picture shows")
    data = {"image/png": base64.b64encode(png(drawing)).decode(), "text/plain": f"[figure: {alt}]"}
    width = round(drawing.get_figwidth() * 96)
    display(data, metadata={"image/png": {"alt": alt, "width": width}}, raw=True)
    _close(drawing)


def boxes(
    axes: Axes,
    owners: Sequence[str | None],
    *,
    columns: int,
    labels: Sequence[str] | None = None,
    colors: Mapping[str, str] | None = None,
    marked: Iterable[int] = (),
    row_labels: Sequence[str] | None = None,
    label_size: float = 8.0,
) -> dict[str, str]:
    """Draw memory as rows of boxes, colored by owner; returns the color of each owner.

    Args:
        axes: to draw into.
        owners: the owner of each box, in the order of addresses; None for a free box, "" for no box at all.
        columns: boxes in a row.
        labels: text in each box.
        colors: color of an owner; other owners get the next color of the palette.
        marked: indices of boxes with a thick outline.
        row_labels: text to the left of each row.
        label_size: size of the labels, in points.
    """
    chosen = dict(colors or {})
    for owner in owners:
        if owner and owner not in chosen:
            chosen[owner] = PALETTE[len(chosen) % len(PALETTE)]
    outlined = set(marked)
    # Boxes and their labels are inside the axes: the layout need not measure them, which takes a third of the time.
    inside: Any = {"in_layout": False}
    for index, owner in enumerate(owners):
        if owner == "":
            continue
        row, column = divmod(index, columns)
        color = EMPTY if owner is None else chosen[owner]
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor=PAPER, linewidth=1.0, **inside))
        if index in outlined:
            inner = Rectangle(
                (column + 0.06, row + 0.06), 0.88, 0.88, fill=False, edgecolor=INK, linewidth=2.0, zorder=3, **inside
            )
            axes.add_patch(inner)
        if labels is not None and labels[index]:
            style: Any = {"ha": "center", "va": "center", "fontsize": label_size, "color": text_color(color), **inside}
            axes.text(column + 0.5, row + 0.5, labels[index], **style)
    rows = -(-len(owners) // columns)
    for row, text in enumerate(row_labels or ()):
        axes.text(-0.25, row + 0.5, text, ha="right", va="center", fontsize=9)
    axes.set(xlim=(-0.05, columns + 0.05), ylim=(rows + 0.05, -0.05), aspect="equal")
    axes.set_axis_off()
    return chosen


def legend(axes: Axes, colors: Mapping[str, str], **options: Any) -> None:
    """Draw a legend of the owners' colors above the boxes; `options` are arguments of `Axes.legend`."""
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color in colors.values()]
    place: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1.0),
        "ncols": len(colors),
        "handlelength": 1.1,
        "borderaxespad": 0.2,
    }
    axes.legend(handles, list(colors), **(place | options))


def grid_of_bytes(
    owners: Sequence[str | None],
    *,
    columns: int = 16,
    labels: Sequence[str] | None = None,
    colors: Mapping[str, str] | None = None,
    marked: Iterable[int] = (),
    first: int = 0,
    title: str = "",
) -> Figure:
    """Bytes of memory in rows, colored by owner, with the offset of each row's first byte on the left.

    Args:
        owners: the owner of each byte, or None.
        columns: bytes in a row; 16 makes a row one wide load.
        labels, colors, marked: as in `boxes`.
        first: offset of the first byte.
        title: text above the figure.
    """
    rows = -(-len(owners) // columns)
    drawing, axes = figure(0.9 + 0.44 * columns, 0.75 + 0.44 * rows)
    names = [str(first + row * columns) for row in range(rows)]
    used = boxes(axes, owners, columns=columns, labels=labels, colors=colors, marked=marked, row_labels=names)
    legend(axes, used)
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return drawing


def block_table_figure(
    tables: Mapping[str, Sequence[int]], num_blocks: int, *, columns: int = 16, title: str = ""
) -> Figure:
    """The pool's blocks, colored by the sequence that owns them, above the block table of each sequence.

    Args:
        tables: block ids of each sequence, in order; a block in several tables is drawn as shared.
        num_blocks: size of the pool.
        columns: blocks in a row of the pool.
        title: text above the figure.
    """
    users = [[name for name, table in tables.items() if block in table] for block in range(num_blocks)]
    owners = [None if not names else names[0] if len(names) == 1 else "shared" for names in users]
    colors = {name: PALETTE[i % 6] for i, name in enumerate(tables)} | {"shared": PALETTE[6]}
    colors = {name: color for name, color in colors.items() if name != "shared" or "shared" in owners}
    rows = -(-num_blocks // columns)
    width = max([columns, *(len(table) for table in tables.values())])
    size = (1.6 + 0.46 * width, 1.15 + 0.46 * (rows + len(tables)))
    drawing, (pool, below) = figure(*size, rows=2, height_ratios=[rows, max(1, len(tables))])
    names = [f"blocks {r * columns}…" if rows > 1 else "pool" for r in range(rows)]
    boxes(
        pool,
        owners,
        columns=columns,
        labels=[str(b) for b in range(num_blocks)],
        colors=colors,
        row_labels=names,
    )
    legend(pool, colors)
    cells: list[str | None] = []
    texts: list[str] = []
    for table in tables.values():
        cells += [owners[block] for block in table] + [""] * (width - len(table))
        texts += [str(block) for block in table] + [""] * (width - len(table))
    boxes(below, cells, columns=width, labels=texts, colors=colors, row_labels=list(tables))
    for axes in (pool, below):
        axes.set_xlim(-2.2, width + 0.05)
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return drawing


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over items with a progress bar; use it in cells tagged nbval-ignore-output.

    Args:
        items: what to iterate over.
        label: text next to the bar.
        total: number of items, if `items` has no length.
    """
    yield from tqdm(items, desc=label, total=total)


def text_color(background: str) -> str:
    """The text color with the better contrast on a background such as "#0072B2": dark or white."""
    red, green, blue = (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _close(drawing: Figure) -> None:
    """Close a figure of pyplot, so that a notebook does not show it twice."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(drawing)
