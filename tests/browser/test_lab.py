"""`make lab` as a reader meets it: the page is up, every chapter opens and runs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from selenium.webdriver.common.by import By

from tests.browser.conftest import ROOT, Lab, wait_for
from tests.browser.lab_page import end_kernel, open_notebook, run_cells, show_cell

CHAPTERS = [path.name for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]

WITH_OUTPUT = """
return window.jupyterapp.shell.currentWidget.content.widgets.findIndex(cell =>
    cell.model.outputs && cell.model.outputs.toJSON().some(output => output.data && arguments[0] in output.data));
"""
FILE_PANEL = """
const shell = window.jupyterapp.shell;
const panel = document.getElementById('jp-left-stack');
return {collapsed: shell.leftCollapsed, width: panel ? panel.getBoundingClientRect().width : 0};
"""
# For each cell: whether its metadata say that its code is folded, and whether the page folds it.
FOLDED = """
const cells = window.jupyterapp.shell.currentWidget.content.widgets;
return cells.map(cell => [
    Boolean((cell.model.getMetadata('jupyter') || {}).source_hidden),
    Boolean(cell.inputHidden),
]);
"""
# The frames of the tables that the page has drawn: wider inside than outside, and how high the rows are.
TABLES = """
return [...document.querySelectorAll('.jp-OutputArea-output div.kvgather-table')].map(frame => ({
    overflow: getComputedStyle(frame).overflowX,
    wrapping: [...frame.querySelectorAll('td')].map(cell => getComputedStyle(cell).whiteSpace),
    fits: frame.getBoundingClientRect().right <= document.documentElement.clientWidth,
}));
"""


def test_lab_says_what_the_machine_can_do_and_where_it_is(lab: Lab, first_chapter: str) -> None:
    said = "".join(lab.lines)
    assert said.index("torch") < said.index(lab.address)
    places = []
    for step in ("checking this machine", "copying chapters", "starting JupyterLab"):
        found = re.search(rf"^kvgather: {step}: \d+\.\d s$", said, flags=re.M)
        assert found, step
        places.append(found.start())
    assert places == sorted(places)
    assert first_chapter in lab.address
    assert f":{lab.taken_port}/" not in lab.address
    assert (lab.root / first_chapter).read_bytes() == (
        lab.root / first_chapter.replace("my-notebooks", "notebooks")
    ).read_bytes()


def test_lab_opens_on_the_first_chapter(lab: Lab, browser: Any, first_chapter: str) -> None:
    open_notebook(browser, lab.address, first_chapter)
    shown = wait_for(
        "its title", lambda: [h1.text for h1 in browser.find_elements(By.CSS_SELECTOR, ".jp-RenderedMarkdown h1")]
    )
    number = first_chapter.split("/")[1].split("_")[0]
    assert shown[0].startswith(f"{number} · ")
    assert browser.execute_script(FILE_PANEL) == {"collapsed": True, "width": 0}
    config = json.loads(browser.execute_script("return document.getElementById('jupyter-config-data').textContent"))
    assert "@jupyterlab/apputils-extension:announcements" in config["disabledExtensions"]
    end_kernel(browser)


def test_code_that_draws_is_folded_and_tables_scroll(lab: Lab, browser: Any) -> None:
    path = "my-notebooks/01_paged_cache.ipynb"
    size = browser.get_window_size()
    browser.set_window_size(800, 1600)
    try:
        open_notebook(browser, lab.open(path).replace("01_paged_cache/tree", "folded/tree"), path)
        cells = wait_for("its cells", lambda: browser.execute_script(FOLDED))
        assert any(folded for folded, _ in cells) and not all(folded for folded, _ in cells)
        assert [shown for _, shown in cells] == [folded for folded, _ in cells]
        show_cell(browser, first_cell_with(browser, "text/html"))
        tables = wait_for("a table", lambda: browser.execute_script(TABLES))
        for table in tables:
            assert table["overflow"] == "auto" and table["fits"]
            assert set(table["wrapping"]) == {"nowrap"}
    finally:
        browser.set_window_size(size["width"], size["height"])
    end_kernel(browser)


def first_cell_with(browser: Any, kind: str) -> int:
    """The place of the first cell that has an output of this type."""
    found = browser.execute_script(WITH_OUTPUT, kind)
    assert found >= 0, f"no cell of this chapter has an output of type {kind}"
    return int(found)


def test_glossary_opens_as_a_page_with_anchors(lab: Lab, browser: Any) -> None:
    browser.get(lab.open("my-notebooks/glossary.md"))
    headings = "return [...document.querySelectorAll('.jp-MarkdownViewer h2')].map(h2 => h2.textContent)"
    shown = wait_for("the glossary", lambda: browser.execute_script(headings))
    assert any(heading.startswith("block_table") for heading in shown)
    anchor = ".jp-MarkdownViewer h2[id='block_table'], .jp-MarkdownViewer h2[data-jupyter-id='block_table']"
    assert browser.find_elements(By.CSS_SELECTOR, anchor)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_cell_of_a_chapter_runs(lab: Lab, browser: Any, chapter: str) -> None:
    path = f"my-notebooks/{chapter}"
    open_notebook(browser, lab.open(path), path)
    run_cells(browser)
    end_kernel(browser)
