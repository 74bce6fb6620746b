"""Step through the accesses of a trace: the program, the line in the kernel, and the elements it accesses.

    stepper(trace)                   # all accesses
    stepper(trace, program=(17, 1))  # those of one program

`kvgather.workbook.step_picture.show_steps` draws single steps as a static picture.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets
import numpy as np

from kvgather.lab.trace import Access, Trace
from kvgather.workbook.figures import BAD, EMPTY, GOOD, INK, PAPER
from kvgather.workbook.step_picture import COLUMNS, StripRow, function_source, in_words, strip

__all__ = ["Steps", "step_html", "stepper"]

LINES = 17
"""Lines of the kernel shown around the current one."""

# Every color is set: the card is opaque, so that it reads the same on a light and on a dark page.
STYLE = f"""<style>
.kvgather-step {{background:{PAPER}; color:{INK}; padding:8px 12px; font-size:13px; line-height:1.45; overflow-x:auto}}
.kvgather-step pre {{background:none; color:{INK}; margin:6px 0; font-size:12px; line-height:1.4}}
.kvgather-step mark {{background:#F0E442; color:{INK}; display:inline-block; min-width:100%}}
.kvgather-step .row {{white-space:nowrap; height:17px}}
.kvgather-step .row b {{display:inline-block; width:64px; text-align:right; padding-right:6px; font:11px monospace}}
.kvgather-step i {{display:inline-block; width:15px; height:14px; margin-right:1px; vertical-align:top;
  box-sizing:border-box; text-align:center; font:bold 11px/14px monospace; color:white}}
.kvgather-step .inside {{background:{GOOD}}} .kvgather-step .exists {{background:{EMPTY}; border:1px solid #CFCEC6}}
.kvgather-step .outside {{background:{BAD}}} .kvgather-step .off {{border:1px dashed {INK}; color:{INK}}}
.kvgather-step .legend {{margin-top:8px; font-size:12px}} .kvgather-step .legend i {{margin:2px 3px 0 10px}}
.kvgather-step .whole {{position:relative; height:14px; margin:4px 0 8px 70px; width:{COLUMNS * 16}px}}
.kvgather-step .whole b {{position:absolute; left:-70px; width:64px; text-align:right; font:11px monospace}}
.kvgather-step .whole span {{position:absolute; top:0; height:100%; min-width:2px}}
</style>"""
LEGEND = (
    '<div class="row legend"><b></b><i class="inside"></i> accessed '
    '<i class="outside">×</i> accessed, outside the tensor '
    '<i class="off">–</i> lane disabled by the mask <i class="exists"></i> element of the tensor</div>'
)
MARKS = {"outside": "×", "off": "–"}


class Steps:
    """The accesses that a stepper shows, and the places to which its buttons lead.

    Attributes:
        accesses: the accesses of the trace, or those of one program or one argument.
    """

    def __init__(self, trace: Trace, program: tuple[int, ...] | None = None, argument: str | None = None) -> None:
        self.accesses = list(trace.select(argument, program))
        keys = [(access.launch, access.program) for access in self.accesses]
        self._starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        self._outside = [i for i, access in enumerate(self.accesses) if access.outside.any()]

    def __len__(self) -> int:
        return len(self.accesses)

    def bounded(self, step: int) -> int:
        """The nearest step that exists; 0 without accesses."""
        return max(0, min(step, len(self) - 1))

    def next_program(self, step: int) -> int:
        """The first access of the next program, or `step` in the last program."""
        return next((start for start in self._starts if start > step), step)

    def next_outside(self, step: int) -> int:
        """The next access outside its tensor; after the last one, the first of all; `step` if there is none."""
        return next((i for i in self._outside if i > step), self._outside[0] if self._outside else step)

    @property
    def num_outside(self) -> int:
        """Accesses with an element outside the tensor."""
        return len(self._outside)


def stepper(
    trace: Trace, *, program: tuple[int, ...] | None = None, argument: str | None = None, step: int = 0
) -> ipywidgets.Widget:
    """The widget: buttons and a slider for the step, the kernel's source with the current line, and the elements.

    Args:
        trace: a trace of one or several launches.
        program: the program to show; None for all programs, in the order in which they ran.
        argument: the argument to show; None for all.
        step: the access shown first, from 0; a number past the end shows the last one.
    """
    steps = Steps(trace, program, argument)
    last = max(0, len(steps) - 1)
    slider = ipywidgets.IntSlider(value=steps.bounded(step), max=last, description="step", layout={"width": "45%"})
    play = ipywidgets.Play(value=slider.value, max=last, interval=700)
    ipywidgets.jslink((play, "value"), (slider, "value"))
    page = ipywidgets.HTML()

    def button(name: str, tooltip: str, target: object, *, disabled: bool = False) -> ipywidgets.Button:
        result = ipywidgets.Button(description=name, tooltip=tooltip, disabled=disabled, layout={"width": "auto"})

        def go(_: object) -> None:
            slider.value = target(slider.value)  # type: ignore[operator]

        result.on_click(go)
        return result

    empty = not len(steps)
    buttons = [
        button("◀ back", "previous access", lambda at: steps.bounded(at - 1), disabled=empty),
        button("forward ▶", "next access", lambda at: steps.bounded(at + 1), disabled=empty),
        button("next program", "first access of the next program", steps.next_program, disabled=empty),
        button("next outside", "next access outside its tensor", steps.next_outside, disabled=not steps.num_outside),
    ]

    def redraw(_: object = None) -> None:
        page.value = step_html(steps.accesses, slider.value)

    slider.observe(redraw, names="value")
    redraw()
    widget = ipywidgets.VBox([ipywidgets.HBox([*buttons[:2], play, slider]), ipywidgets.HBox(buttons[2:]), page])
    widget.add_class("kvgather-stepper")
    return widget


def step_html(accesses: Sequence[Access], step: int) -> str:
    """One step as HTML: a heading, the kernel's lines, the sentence, the whole tensor as a bar, and its strip.

    Args:
        accesses: all accesses of the stepper.
        step: number of the access to show.
    """
    if not accesses:
        return f'{STYLE}<div class="kvgather-step" data-step="">The trace has no access to show.</div>'
    access = accesses[step]
    heading = f"step {step} of {len(accesses) - 1} · launch {access.launch}: <b>{html.escape(access.kernel)}</b>"
    parts = [heading, _code(access), f"<div>{html.escape(in_words(access))}</div>"]
    if access.argument:
        rows, more = strip(access)
        parts += [_whole(access), *map(_row, rows)]
        parts.append(f'<div class="row"><b></b>and {more} more row{"s" * (more != 1)}</div>' if more else "")
        parts.append(LEGEND)
    return f'{STYLE}<div class="kvgather-step" data-step="{step}">{"".join(parts)}</div>'


def _code(access: Access) -> str:
    """The lines of the kernel around the access, the current one highlighted."""
    first, lines = function_source(access.file, access.line)
    at = access.line - first
    start = max(0, min(at - LINES // 2, len(lines) - LINES))
    shown = []
    for number, text in enumerate(lines[start : start + LINES], start=first + start):
        line = f"{number:4d}  {html.escape(text)}"
        shown.append(f"<mark>{line}</mark>" if number == access.line else line)
    file = html.escape(access.file.replace("\\", "/").rsplit("/", 1)[-1])
    return f"<pre>{chr(10).join(shown)}</pre>" if shown else f"<pre>{file}, line {access.line}</pre>"


def _whole(access: Access) -> str:
    """A bar to scale: the tensor, and the accessed elements on it or beyond its ends."""
    elements, outside = np.ravel(access.elements), np.ravel(access.outside)
    enabled = np.ravel(access.mask)
    if not enabled.any():
        return ""
    low = min(0, int(elements[enabled].min()))
    scale = 100 / (max(access.size, int(elements[enabled].max()) + 1) - low)
    bar = [_span((0 - low) * scale, access.size * scale, "exists", f"{access.argument}: {access.size} elements")]
    for chosen, name in ((enabled & ~outside, "inside"), (outside, "outside")):
        # Neighbours are one mark, and so are elements nearer to each other than a pixel.
        places = np.unique(((elements[chosen] - low) * scale * 5).astype(np.int64))
        breaks = np.flatnonzero(np.diff(places) > max(1, int(np.ceil(scale * 5))))
        if places.size:
            starts, ends = places[np.r_[0, breaks + 1]] / 5, places[np.r_[breaks, places.size - 1]] / 5
            bar += [_span(a, b - a + scale, name) for a, b in zip(starts, ends, strict=True)]
    return f'<div class="whole"><b>to scale</b>{"".join(bar)}</div>'


def _span(left: float, width: float, name: str, title: str = "") -> str:
    style = f"left:{min(left, 99.7):.2f}%;width:{width:.2f}%"
    return f'<span class="{name}" style="{style}" title="{html.escape(title)}"></span>'


def _row(row: StripRow) -> str:
    places = []
    for place, state in enumerate(row.states, start=row.first):
        places.append(f'<i class="{state}" title="element {place}">{MARKS.get(state, "")}</i>')
    return f'<div class="row"><b>{"⋯ " if row.skipped else ""}{row.first}</b>{"".join(places)}</div>'
