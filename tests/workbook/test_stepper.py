"""The stepper shows the access that its buttons lead to, marks what is outside, and stays fast on long traces."""

from __future__ import annotations

import dataclasses
import html
import re
import time

import numpy as np
import pytest
import torch

from kvgather.lab.trace import Access, Trace, trace
from kvgather.workbook import step_picture as pictures
from kvgather.workbook.figures import png
from kvgather.workbook.step_picture import describe, function_source, in_words, show_steps, strip
from kvgather.workbook.widgets.stepper import Steps, step_html, stepper


def access(
    elements: list[int],
    size: int,
    *,
    program: tuple[int, ...] = (0,),
    kind: str = "load",
    argument: str = "x_ptr",
    mask: list[bool] | None = None,
    width: int = 4,
    line: int = 1,
    launch: int = 0,
) -> Access:
    """An access whose elements from `size` on, and negative ones, are outside."""
    at = np.array(elements, np.int64)
    on = np.array(mask if mask is not None else [True] * len(elements), bool)
    outside = on & ((at < 0) | (at >= size)) if argument else np.zeros(at.shape, bool)
    return Access("k", launch, program, kind, argument, "no_file.py", line, at * width, width, at, on, outside, size)


def text_of(page: str) -> str:
    """The visible text of a step."""
    body = page.split("</style>")[1]
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</?(div|pre|mark)[^>]*>", "\n", body)))


def parts(widget):
    top, below, page = widget.children
    back, forward, play, slider = top.children
    next_program, next_outside = below.children
    return back, forward, play, slider, next_program, next_outside, page


THREE = Trace(
    [
        access([0, 1], 10),
        access([4, 5], 10, program=(1,), kind="store"),
        access([9, 10], 10, program=(1,)),
        access([-1], 10, program=(2,)),
    ]
)


def test_buttons_move_and_stop_at_the_ends():
    back, forward, _, slider, next_program, _, page = parts(stepper(THREE))
    seen = [page.value]
    back.click()
    assert slider.value == 0
    for step in (1, 2, 3, 3):
        forward.click()
        assert slider.value == step
        assert f'data-step="{step}"' in page.value
        seen.append(page.value)
    back.click()
    assert slider.value == 2
    assert len(set(seen)) == 4
    slider.value = 0
    next_program.click()
    assert slider.value == 1
    next_program.click()
    assert slider.value == 3
    next_program.click()
    assert slider.value == 3


def test_next_outside_goes_round():
    *_, slider, _, next_outside, page = parts(stepper(THREE))
    assert Steps(THREE).num_outside == 2
    for step in (2, 3, 2):
        next_outside.click()
        assert slider.value == step
        assert 'class="outside"' in page.value.split("legend")[-2]
    clean = parts(stepper(Trace(THREE.accesses[:2])))
    assert clean[5].disabled and not clean[1].disabled


def test_play_and_slider_have_the_same_bounds():
    _, _, play, slider, *_ = parts(stepper(THREE, step=99))
    assert (slider.min, slider.max, slider.value) == (play.min, play.max, play.value) == (0, 3, 3)
    slider.value = 1  # as play does in the browser
    assert parts(stepper(THREE, step=-5))[3].value == 0


def test_one_program_or_one_argument():
    _, _, _, slider, *_, page = parts(stepper(THREE, program=(1,)))
    assert slider.max == 1
    assert "program (1,): store of x_ptr, elements 4 to 5 (bytes 16 to 23)" in text_of(page.value)
    assert parts(stepper(THREE, argument="y_ptr"))[3].max == 0


def test_an_empty_trace_says_so():
    widget = stepper(Trace())
    back, forward, _, slider, next_program, next_outside, page = parts(widget)
    assert "The trace has no access to show." in text_of(page.value)
    assert all(button.disabled for button in (back, forward, next_program, next_outside))
    assert slider.max == 0
    assert "kvgather-stepper" in widget._dom_classes


def test_programs_of_two_launches_are_told_apart():
    steps = Steps(Trace([access([0], 1), access([0], 1, launch=1), access([0], 1, launch=1)]))
    assert [steps.next_program(step) for step in range(3)] == [1, 1, 2]
    assert "launch 1: k" in text_of(step_html(steps.accesses, 2))


def test_ten_thousand_accesses_redraw_quickly():
    elements = list(range(0, 64 * 16, 16))
    long = Trace([access([e + i for e in elements], 1 << 20, program=(i // 4,)) for i in range(10_000)])
    *_, slider, next_program, _, page = parts(stepper(long))
    times = []
    for step in range(0, 10_000, 99):
        start = time.perf_counter()
        slider.value = step
        times.append(time.perf_counter() - start)
        assert f'data-step="{step}"' in page.value
    print(f"median redraw {sorted(times)[len(times) // 2] * 1e3:.1f} ms")
    assert sorted(times)[len(times) // 2] < 0.2  # 3 ms; the limit of the whole redraw in a browser
    slider.value = 9_997
    next_program.click()
    assert slider.value == 9_997


def test_an_access_with_many_elements_stays_a_small_page():
    page = step_html([access(list(range(100_000)), 100_000)], 0)
    assert len(page) < 60_000
    assert "and 3113 more rows" in text_of(page)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (access([3], 8, width=1), "load of x_ptr, element 3 (1 byte)"),
        (access([0, 1, 2], 8), "load of x_ptr, elements 0 to 2 (bytes 0 to 11)"),
        (access([1, 17, 33], 64, width=1), "load of x_ptr, elements 1 to 33 in steps of 16 (3 bytes)"),
        (access([0, 1, 8, 9], 16), "load of x_ptr, 4 elements in 2 pieces, 0 to 9 (16 bytes)"),
        (access([5, 5], 8), "load of x_ptr, 2 times element 5 (8 bytes)"),
        (access([8, 9], 9, kind="store"), "store of x_ptr, elements 8 to 9 (bytes 32 to 39); 1 outside: x_ptr has 9 "),
        (access([8, 9], 9, mask=[True, False]), "element 8 (bytes 32 to 35); the mask disables 1 of 2 lanes"),
        (access([8, 9], 9, mask=[False, False]), "load of x_ptr, no element; the mask disables 2 of 2 lanes"),
        (access([8], 0, argument=""), "load of a pointer from memory, 1 lane of 4 bytes; not checked"),
    ],
)
def test_an_access_in_words(one, words):
    assert words in in_words(one)
    assert in_words(one).startswith("program (0,): ")
    assert html.escape(in_words(one)) in step_html([one], 0)


def test_a_strip_shows_a_small_tensor_whole_and_a_large_one_where_it_is_touched():
    (row,), more = strip(access([2, 11], 10, mask=[True, True]))
    assert row.states[:12] == ("exists",) * 2 + ("inside",) + ("exists",) * 7 + ("beyond", "outside") and more == 0
    (row,), _ = strip(access([0, 1], 1, mask=[True, False]))
    assert row.states[:3] == ("inside", "off", "beyond")
    rows, more = strip(access([0, 5000, 9999], 10_000), rows=2)
    assert [(r.first, r.skipped) for r in rows] == [(0, False), (4992, True)] and more == 1
    rows, _ = strip(access([-3], 4))
    assert [r.first for r in rows] == [-32, 0] and rows[0].states[29] == "outside"


def test_the_bar_is_to_scale():
    page = step_html([access([656], 1)], 0)
    (bar,) = re.findall(r'<div class="whole">(.*?)</div>', page)
    (tensor, beyond) = re.findall(r'class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', bar)
    assert tensor == ("exists", "0.00", "0.15") and beyond[0] == "outside" and float(beyond[1]) > 99
    before = step_html([access([-1], 3)], 0)
    assert 'class="exists" style="left:25.00%;width:75.00%"' in before
    assert 'class="outside" style="left:0.00%' in before


def test_an_element_between_those_of_a_view_is_outside():
    gap = dataclasses.replace(access([2, 3], 8), outside=np.array([True, False]), between=np.array([True, False]))
    assert in_words(gap).endswith("; 1 outside: between the view's elements")
    (row,), _ = strip(gap)
    assert row.states[2:4] == ("outside", "inside")


@pytest.mark.triton
def test_steps_of_a_real_kernel_show_its_source():
    from kvgather.lab.planted import run

    lengths, cu_seqlens = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    with trace() as t:
        run(lengths, cu_seqlens)
    *_, slider, _, next_outside, page = parts(stepper(t))
    assert slider.max == 2
    next_outside.click()
    said = text_of(page.value)
    (marked,) = re.findall(r"<mark>(.*?)</mark>", page.value)
    assert f"{t.accesses[1].line:4d}  " in marked and "tl.load(cu_seqlens_ptr + i - 1" in marked
    assert "def lengths_kernel(" in said
    assert "1 outside: cu_seqlens_ptr has 4 elements" in said
    first, lines = function_source(t.accesses[0].file, t.accesses[0].line)
    assert lines[0] == "@triton.jit" and first < t.accesses[0].line < first + len(lines)


def test_source_that_is_not_there():
    assert function_source("no_file.py", 3) == (1, [])
    assert "no_file.py, line 1" in text_of(step_html([access([0], 1)], 0))


def test_a_static_picture_says_what_it_shows(monkeypatch):
    shown = []
    monkeypatch.setattr(pictures, "show", lambda drawing, alt: shown.append((png(drawing), alt)))
    show_steps(THREE, [0, 2, 2, 99])
    show_steps(THREE, [7])
    assert all(data.startswith(b"\x89PNG") for data, _ in shown)
    assert shown[0][1] == describe([THREE.accesses[0], THREE.accesses[2]])
    assert "1 outside: x_ptr has 10 elements" in shown[0][1]
    assert shown[1][1] == "No access."


def test_a_static_picture_marks_what_is_outside():
    (axes,) = pictures.step_picture([THREE.accesses[2]]).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("×") == 1 and in_words(THREE.accesses[2]) in texts
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["accessed", "× accessed, outside the tensor", "element of the tensor"]
    (many,) = pictures.step_picture([access(list(range(0, 640, 2)), 640)]).axes
    assert "and 16 rows more" in [text.get_text() for text in many.texts]
