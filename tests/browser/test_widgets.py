"""Each widget in its chapter in JupyterLab: a control that is moved changes the picture, the right way and in time."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from kvgather.workbook.figures import figure, png
from kvgather.workbook.layout_picture import PoolSizes, locate, place_picture
from kvgather.workbook.widgets.fp8_bits import bits_picture
from kvgather.workbook.widgets.layout_explorer import WIDGET_DPI
from kvgather.workbook.widgets.prefix_sharing import PROMPTS, Story
from kvgather.workbook.widgets.prefix_sharing import draw as draw_pool
from tests.browser.conftest import Lab, wait_for
from tests.browser.lab_page import end_kernel, open_notebook, run_cells, show_cell, widget_cell

SECONDS = 2  # for a redraw: under 0.2 s on two idle cores; the suite shares them

# From the reader's key or click to the new picture, decoded; window.redraw is the time in milliseconds.
WATCH = """
const [widget, picture] = arguments;
let start = null;
window.redraw = null;
for (const kind of ['keydown', 'click'])
    widget.addEventListener(kind, () => { start = start ?? performance.now(); }, {capture: true, once: true});
const observer = new MutationObserver(() => {
    observer.disconnect();
    picture.decode().then(() => requestAnimationFrame(() => { window.redraw = performance.now() - start; }));
});
observer.observe(picture, {attributes: true, attributeFilter: ['src']});
"""
BYTES = """
const [picture, done] = arguments;
fetch(picture.src).then(answer => answer.blob()).then(blob => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.split(',')[1]);
    reader.readAsDataURL(blob);
});
"""


class Shown:
    """A widget on the page: its controls, its picture, and how long its redraws took."""

    def __init__(self, browser: Any, root: Any) -> None:
        self.browser, self.root = browser, root
        self.picture = wait_for("its picture", lambda: root.find_elements(By.CSS_SELECTOR, "img.widget-image"))[0]
        self.times: list[float] = []

    @property
    def png(self) -> bytes:
        return base64.b64decode(self.browser.execute_async_script(BYTES, self.picture))

    @property
    def sentence(self) -> str:
        return str(self.root.find_element(By.XPATH, "./*[contains(@class, 'widget-label')]").text)

    def slider(self, name: str) -> Any:
        row = f".//*[contains(@class, 'widget-slider')][./label[text()='{name}']]"
        return self.root.find_element(By.XPATH, row).find_element(By.CSS_SELECTOR, ".noUi-handle")

    def button(self, text: str, place: int = 0) -> Any:
        found = self.root.find_elements(By.CSS_SELECTOR, "button")
        return [button for button in found if button.text == text][place]

    def does(self, act: Callable[[], None]) -> None:
        """Act on a control; returns when the page shows another picture."""
        before = self.png
        self.browser.execute_script(WATCH, self.root, self.picture)
        act()
        self.times.append(wait_for("the redraw", lambda: self.browser.execute_script("return window.redraw")))
        assert self.png != before

    def step(self, slider: str, key: str = Keys.ARROW_RIGHT) -> None:
        """Move a slider by one step, with the keyboard."""
        self.does(lambda: self.slider(slider).send_keys(key))

    def press(self, text: str, place: int = 0) -> None:
        self.does(self.button(text, place).click)


@pytest.fixture
def show(lab: Lab, browser: Any, tmp_path: Path) -> Any:
    """Run a chapter up to the cell that calls a widget's function, and find the widget by its class."""
    shown: list[Shown] = []

    def run(chapter: str, name: str) -> Shown:
        path = f"my-notebooks/{chapter}.ipynb"
        open_notebook(browser, lab.open(path).replace(f"{chapter}/tree", f"{name}/tree"), path)
        cell = widget_cell(browser, f"= {name}(")
        run_cells(browser, cell + 1)
        show_cell(browser, cell)
        css = ".kvgather-" + name.replace("_", "-")
        shown.append(Shown(browser, wait_for("the widget", lambda: browser.find_elements(By.CSS_SELECTOR, css))[0]))
        return shown[0]

    yield run
    if shown:
        (widget,) = shown
        assert widget.root.screenshot(str(tmp_path / "widget.png"))
        print(f"redraw: median {statistics.median(widget.times):.0f} ms, slowest {max(widget.times):.0f} ms")
        end_kernel(browser)
        assert statistics.median(widget.times) < 1000 * SECONDS


def test_bent_picture(show: Callable[[str, str], Shown]) -> None:
    widget = show("00_start_here", "bend_picture")
    assert widget.sentence == "0 of 128 tokens are wrong"
    right = widget.png
    widget.step("scale")
    assert widget.sentence == "128 of 128 tokens are wrong, and nothing was raised"
    widget.step("scale", Keys.ARROW_LEFT)
    assert widget.sentence == "0 of 128 tokens are wrong" and widget.png == right
    widget.step("block id")
    assert widget.sentence == "16 of 128 tokens are wrong, and nothing was raised"
    widget.step("block id", Keys.END)
    assert widget.sentence.startswith("16 of 128 tokens are wrong; check: ")


def test_prefix_sharing(show: Callable[[str, str], Shown]) -> None:
    widget, story = show("01_paged_cache", "prefix_sharing"), Story()
    for place, name in enumerate("AB"):
        widget.press("run", place)
        assert_pool(widget, story, story.run(name, PROMPTS[name]))
    assert story.live["B"].num_cached_tokens == 8
    widget.press("free", 0)
    assert_pool(widget, story, story.free("A"))
    box = widget.root.find_elements(By.CSS_SELECTOR, "input[type=text]")[2]
    box.clear()
    box.send_keys("one two")
    widget.press("run", 2)
    assert_pool(widget, story, story.run("C", "one two"))


def assert_pool(widget: Shown, story: Story, caption: str) -> None:
    drawing, axes = figure(8.6, 1.85)
    draw_pool(axes, story, caption)
    assert widget.png == png(drawing)


def test_fp8_bits(show: Callable[[str, str], Shown]) -> None:
    widget, code = show("02_fp8_and_scales", "fp8_bits"), 0x38
    assert widget.png == png(bits_picture(code))
    for bit in (0, 7, 6, 3):
        switch = widget.root.find_elements(By.CSS_SELECTOR, "button")[7 - bit]
        widget.does(switch.click)
        code ^= 1 << bit
        assert switch.text == str(code >> bit & 1)
        assert widget.png == png(bits_picture(code))


def test_layout_explorer(show: Callable[[str, str], Shown]) -> None:
    widget = show("03_layouts", "layout_explorer")
    element = {"block": 1, "head": 1, "page_offset": 5, "dim": 20}
    assert_place(widget, "SHUFFLE", "value", element)
    widget.press("NHD")
    assert_place(widget, "NHD", "value", element)
    widget.press("K")
    assert_place(widget, "NHD", "key", element)
    for name in ("block", "page_offset", "dim"):
        widget.step(name)
        element[name] += 1
        assert_place(widget, "NHD", "key", element)
    widget.step("head", Keys.ARROW_LEFT)
    assert_place(widget, "NHD", "key", element | {"head": 0})


def assert_place(widget: Shown, layout: str, which: Any, element: dict[str, int]) -> None:
    place = locate(layout, which, **element, sizes=PoolSizes(3, 16, 2, 32))
    assert widget.sentence == str(place)
    assert widget.png == png(place_picture(place), WIDGET_DPI)


def test_far_read(show: Callable[[str, str], Shown]) -> None:
    widget = show("05_the_crash", "far_read")
    assert widget.sentence.startswith("block 4,096 reads element 524,288, ")
    widget.step("block id")
    assert widget.sentence.startswith("block 8,192 reads element 1,048,576, ")
    widget.step("heads")
    assert widget.sentence.startswith("block 8,192 reads element 2,097,152, ")
    widget.step("page size", Keys.ARROW_LEFT)
    assert widget.sentence.startswith("block 8,192 reads element 1,048,576, ")
    widget.step("block id", Keys.HOME)
    assert "block 0 reads element 0, 0 bytes behind: that is the scalar itself" in widget.sentence
