"""Single accesses of a trace: the source line, the program, and the elements on a strip of the tensor."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvgather.lab.access import BETWEEN
from kvgather.lab.trace import Access, Trace
from kvgather.workbook.figures import BAD, EMPTY, GOOD, INK, LINE, PAPER, figure, legend, show

__all__ = ["COLUMNS", "StripRow", "describe", "function_source", "in_words", "show_steps", "step_picture", "strip"]

COLUMNS = 32
"""Elements in a row of a strip."""

INSIDE, OUTSIDE, OFF, EXISTS, BEYOND = "inside", "outside", "off", "exists", "beyond"
"""An element in a strip: accessed; accessed and outside the tensor; address of a lane that the mask disables; any other
element of the tensor; a place outside the tensor."""


@dataclass(frozen=True)
class StripRow:
    """A row of a strip.

    Attributes:
        first: element of the first place.
        states: one of `INSIDE`, `OUTSIDE`, `OFF`, `EXISTS` and `BEYOND` for each place.
        skipped: whether rows without an accessed element were left out above.
    """

    first: int
    states: tuple[str, ...]
    skipped: bool


def strip(access: Access, rows: int = 12) -> tuple[list[StripRow], int]:
    """The part of a tensor around one access: all rows of a small tensor, else the rows with accessed elements.

    Args:
        access: the access.
        rows: most rows; the first ones are kept.

    Returns:
        The rows, and the number of further rows with accessed elements.
    """
    elements, mask = np.ravel(access.elements), np.ravel(access.mask)
    outside = np.ravel(access.outside)
    states = dict.fromkeys(elements[~mask].tolist(), OFF)
    states |= dict.fromkeys(elements[mask].tolist(), INSIDE)
    states |= dict.fromkeys(elements[outside].tolist(), OUTSIDE)
    touched = {element // COLUMNS for element in elements[mask].tolist()} or {e // COLUMNS for e in states}
    whole = -(-access.size // COLUMNS)
    if whole <= 4:
        touched |= set(range(whole))
    result: list[StripRow] = []
    for row in sorted(touched)[:rows]:
        places = range(row * COLUMNS, (row + 1) * COLUMNS)
        rest = (EXISTS if 0 <= place < access.size else BEYOND for place in places)
        line = tuple(states.get(place, other) for place, other in zip(places, rest, strict=True))
        skipped = bool(result) and result[-1].first != (row - 1) * COLUMNS
        result.append(StripRow(row * COLUMNS, line, skipped))
    return result, len(touched) - len(result)


def in_words(access: Access) -> str:
    """One access as a sentence: program, kind, argument, elements and bytes, disabled lanes, elements outside."""
    enabled = np.ravel(access.mask)
    elements, count = np.ravel(access.elements)[enabled], int(enabled.sum())
    text = f"program {_index(access.program)}: {access.kind} of {access.argument or 'a pointer from memory'}"
    if not access.argument:
        return f"{text}, {_plural(count, 'lane')} of {_plural(access.width, 'byte')}; not checked"
    text += f", {_elements(elements)}"
    if count:
        text += f" ({_bytes(np.ravel(access.bytes)[enabled], access.width)})"
    if count < enabled.size:
        text += f"; the mask disables {enabled.size - count} of {enabled.size} lanes"
    between = 0 if access.between is None else int(access.between.sum())
    outside = int(access.outside.sum()) - between
    if outside:
        text += f"; {outside} outside: {access.argument} has {_plural(access.size, 'element')}"
    if between:
        text += f"; {between} outside: {BETWEEN}"
    return text


def describe(accesses: Iterable[Access]) -> str:
    """The alt text of `step_picture`: a sentence for each access, with its source line."""
    sentences = [f"Line {access.line}, {in_words(access)}." for access in accesses]
    return " ".join(sentences) or "No access."


def show_steps(
    trace: Trace, steps: Sequence[int], *, program: tuple[int, ...] | None = None, argument: str | None = None
) -> None:
    """Display some steps of a trace as a PNG with an alt text: the static picture next to a stepper.

    Args:
        trace: the trace.
        steps: numbers of the accesses, from 0, among those of `program` and `argument`; a number past the end, or
            a second time, is left out.
        program, argument: as in `Trace.select`.
    """
    accesses = list(trace.select(argument, program))
    chosen = [accesses[step] for step in dict.fromkeys(steps) if 0 <= step < len(accesses)]
    show(step_picture(chosen), alt=describe(chosen))


def step_picture(accesses: Sequence[Access], rows: int = 4) -> Figure:
    """Accesses below each other: the source line, a sentence, and the elements on a strip of the tensor.

    Args:
        accesses: the accesses, of one or several launches.
        rows: most rows of a strip.
    """
    strips = [strip(access, rows) for access in accesses]
    heights = [len(lines) + (more > 0) + 1.9 for lines, more in strips] or [1.0]
    drawing, grid = figure(10.5, 0.35 + 0.29 * sum(heights), len(heights), squeeze=False, height_ratios=heights)
    for (axes,), access, (lines, more) in zip(grid, accesses, strips, strict=False):
        _draw_strip(axes, lines, more)
        code = linecache.getline(access.file, access.line).strip()
        axes.text(0, -1.25, f"line {access.line}   {code}", family="DejaVu Sans Mono", fontsize=9, fontweight="bold")
        axes.text(0, -0.35, in_words(access), fontsize=9)
    if not accesses:
        grid[0, 0].text(0, 0.5, "no access", fontsize=9)
        grid[0, 0].set_axis_off()
        return drawing
    states = {state for lines, _ in strips for line in lines for state in line.states}
    names = {INSIDE: "accessed", OUTSIDE: "× accessed, outside the tensor", EXISTS: "element of the tensor"}
    colors = {name: FACE[state] for state, name in names.items() if state in states}
    if OFF in states:
        colors["– lane disabled by the mask"] = "none"
    legend(grid[0, 0], colors, bbox_to_anchor=(0, 1.0))
    return drawing


FACE = {INSIDE: GOOD, OUTSIDE: BAD, OFF: "none", EXISTS: EMPTY, BEYOND: "none"}


def _draw_strip(axes: Axes, lines: Sequence[StripRow], more: int) -> None:
    for row, line in enumerate(lines):
        label = f"{'⋯ ' if line.skipped else ''}{line.first}"
        axes.text(-0.3, row + 0.5, label, ha="right", va="center", fontsize=8)
        for column, state in enumerate(line.states):
            if state == BEYOND:
                continue
            outline, style = (LINE, "--") if state == OFF else (PAPER, "-")
            box = Rectangle((column, row), 1, 1, facecolor=FACE[state], edgecolor=outline, linestyle=style)
            axes.add_patch(box)
            mark = {OUTSIDE: "×", OFF: "–"}.get(state, "")
            color = INK if state == OFF else "white"
            axes.text(column + 0.5, row + 0.5, mark, ha="center", va="center", fontsize=9, color=color)
    if more:
        axes.text(0, len(lines) + 0.5, f"and {_plural(more, 'row')} more", va="center", fontsize=8)
    axes.set(xlim=(-2.4, COLUMNS + 0.1), ylim=(len(lines) + (more > 0) + 0.1, -1.9), aspect="equal", anchor="W")
    axes.set_axis_off()


def function_source(file: str, line: int) -> tuple[int, list[str]]:
    """The function around a line, with its decorators: the number of its first line, and its lines.

    The lines are those that Python has for the file, also for a notebook's cell. Without a source the list is empty.
    """
    lines = linecache.getlines(file)
    around = [(first, last) for first, last in _functions(file, tuple(lines)) if first <= line <= last]
    if not around:
        return 1, [text.rstrip("\n") for text in lines]
    first, last = max(around)
    return first, [text.rstrip("\n") for text in lines[first - 1 : last]]


@functools.lru_cache(maxsize=64)
def _functions(file: str, lines: tuple[str, ...]) -> list[tuple[int, int]]:
    """First and last line of each function of a file."""
    try:
        tree = ast.parse("".join(lines), file)
    except SyntaxError:  # a cell with a magic
        return []
    return [
        (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def _bytes(first: np.ndarray, width: int) -> str:
    """The accessed bytes in words: those of a run, or their number."""
    run = first.size == 1 or set(np.diff(first).tolist()) == {width}
    count = first.size * width
    return f"bytes {first[0]} to {first[0] + count - 1}" if run and count > 1 else _plural(count, "byte")


def _elements(elements: np.ndarray) -> str:
    """Accessed elements in words: one, a run, equal steps, or the number of pieces."""
    if not elements.size:
        return "no element"
    if elements.size == 1:
        return f"element {elements[0]}"
    ends, steps = f"elements {elements[0]} to {elements[-1]}", set(np.diff(elements).tolist())
    if steps == {1}:
        return ends
    if len(steps) == 1:
        (step,) = steps
        return f"{elements.size} times element {elements[0]}" if step == 0 else f"{ends} in steps of {step}"
    pieces = 1 + int((np.diff(elements) != 1).sum())
    return f"{elements.size} elements in {pieces} pieces, {elements.min()} to {elements.max()}"


def _index(program: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, program))}{',' if len(program) == 1 else ''})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
