"""Chapter 04 in JupyterLab: it runs whole, and its stepper answers to its buttons and plays."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from selenium.webdriver.common.by import By

from tests.browser.conftest import Lab, wait_for
from tests.browser.lab_page import end_kernel, open_notebook, run_cells, show_cell, widget_cell

CHAPTER = "my-notebooks/04_first_gather.ipynb"

# Presses a button and waits until the page of the stepper is that of another step; returns milliseconds.
PRESS = """
const [widget, button, done] = arguments;
const step = () => widget.querySelector('.kvgather-step').dataset.step;
const before = step(), start = performance.now();
const observer = new MutationObserver(() => {
    if (step() === before) return;
    observer.disconnect();
    requestAnimationFrame(() => done(performance.now() - start));
});
observer.observe(widget, {childList: true, subtree: true, attributes: true});
button.click();
"""


def step_of(widget: Any) -> int:
    """The step on the page, read in one call: a redraw between two calls would make an element stale."""
    return int(widget.parent.execute_script("return arguments[0].querySelector('.kvgather-step').dataset.step", widget))


def button_of(widget: Any, name: str) -> Any:
    (found,) = [b for b in widget.find_elements(By.CSS_SELECTOR, "button.jupyter-button") if name in b.text]
    return found


def test_the_stepper_of_chapter_04(lab: Lab, browser: Any, tmp_path: Path) -> None:
    open_notebook(browser, lab.open(CHAPTER), CHAPTER)
    run_cells(browser)
    show_cell(browser, widget_cell(browser, "stepper("))
    widget = wait_for("the stepper", lambda: browser.find_elements(By.CSS_SELECTOR, ".kvgather-stepper"))[0]
    wait_for("its first step", lambda: widget.find_elements(By.CSS_SELECTOR, ".kvgather-step"))
    assert step_of(widget) == 0

    times = [browser.execute_async_script(PRESS, widget, button_of(widget, "forward")) for _ in range(5)]
    assert step_of(widget) == 5
    times += [browser.execute_async_script(PRESS, widget, button_of(widget, "back")) for _ in range(4)]
    assert step_of(widget) == 1
    times.append(browser.execute_async_script(PRESS, widget, button_of(widget, "next program")))
    assert step_of(widget) == 2
    print(f"redraw: median {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms")
    assert statistics.median(times) < 1000  # 200 ms on two idle cores; the suite shares them

    text = widget.find_element(By.CSS_SELECTOR, ".kvgather-step").text
    assert "program (1,): load of x_ptr, elements 4 to 7 (bytes 16 to 31)" in text
    assert "tl.load" in widget.find_element(By.CSS_SELECTOR, ".kvgather-step mark").text
    colors = {
        kind: widget.find_element(By.CSS_SELECTOR, f".row .{kind}").value_of_css_property("background-color")
        for kind in ("inside", "exists", "outside")
    }
    assert len(set(colors.values())) == 3

    play = widget.find_elements(By.CSS_SELECTOR, ".widget-play button, .jupyter-widget-play button")[0]
    browser.execute_script("arguments[0].click()", play)
    wait_for("the last step, by playing", lambda: step_of(widget) == 5, 20)
    assert browser.save_screenshot(str(tmp_path / "stepper.png"))
    end_kernel(browser)
