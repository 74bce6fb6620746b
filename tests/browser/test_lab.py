"""`make lab` as a reader meets it: the page is up, the first chapter opens, cells run, a widget answers."""

from __future__ import annotations

from typing import Any

from selenium.webdriver.common.by import By

from tests.browser.conftest import Lab, wait_for

# What the page knows about the open notebook: for each code cell, whether it ran and what errors it shows.
CELLS = """
const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
if (!panel || !panel.content || !panel.content.widgets || !panel.sessionContext) return null;
if (!panel.sessionContext.isReady) return null;
return panel.content.widgets.filter(cell => cell.model.type === 'code').map(cell => ({
    count: cell.model.executionCount,
    errors: cell.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.evalue),
}));
"""


def headings(browser: Any) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, ".jp-RenderedMarkdown h1")]


def test_lab_says_what_the_machine_can_do_and_where_it_is(lab: Lab, first_chapter: str) -> None:
    said = "".join(lab.lines)
    assert said.index("torch") < said.index(lab.address)
    assert first_chapter in lab.address
    assert ":8888/" not in lab.address
    assert (lab.root / first_chapter).read_bytes() == (
        lab.root / first_chapter.replace("my-notebooks", "notebooks")
    ).read_bytes()


def test_lab_opens_on_the_first_chapter(lab: Lab, browser: Any) -> None:
    browser.get(lab.address)
    wait_for("the lab page", lambda: browser.find_elements(By.ID, "jp-main-dock-panel"))
    shown = wait_for("the first chapter", lambda: headings(browser))
    assert shown[0].startswith("00"), shown
    wait_for("its kernel", lambda: browser.execute_script(CELLS))
