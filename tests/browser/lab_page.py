"""An open chapter in JupyterLab's page: run its cells, show one of them, end its kernel."""

from __future__ import annotations

from typing import Any

from tests.browser.conftest import wait_for

SECONDS = 240  # for all cells of the slowest chapter, which take about a minute on two idle cores

# What the page knows about the open notebook, once its kernel is there.
NOTEBOOK = """
const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
if (!panel || !panel.content || !panel.content.widgets || !panel.sessionContext) return null;
if (!panel.sessionContext.isReady || !panel.sessionContext.session) return null;
return {
    path: panel.context.path,
    status: panel.sessionContext.session.kernel.status,
    cells: panel.content.widgets.map(cell => {
        const outputs = cell.model.outputs ? cell.model.outputs.toJSON() : [];
        return {
            source: cell.model.sharedModel.getSource(),
            code: cell.model.type === 'code',
            ran: cell.model.executionCount,
            errors: outputs.filter(output => output.output_type === 'error').map(output => output.evalue),
            widget: outputs.some(output => output.data && 'application/vnd.jupyter.widget-view+json' in output.data),
        };
    }),
};
"""
# Runs all cells, or the first ones; the answer comes when the last one is done.
RUN = """
const [cells, done] = arguments;
const app = window.jupyterapp;
let command = 'notebook:run-all-cells';
if (cells !== null) {
    app.shell.currentWidget.content.activeCellIndex = cells;
    command = 'notebook:run-all-above';
}
app.commands.execute(command).then(() => done('ran'), error => done(String(error)));
"""
# A committed notebook has the counts of an earlier run.
FORGET_COUNTS = """
for (const cell of window.jupyterapp.shell.currentWidget.content.widgets)
    if (cell.model.type === 'code') cell.model.executionCount = null;
"""
SHOW_CELL = "window.jupyterapp.shell.currentWidget.content.scrollToItem(arguments[0], 'start');"
END_KERNEL = """
const done = arguments[arguments.length - 1];
window.jupyterapp.shell.currentWidget.sessionContext.shutdown().then(() => done(), () => done());
"""


def open_notebook(browser: Any, address: str, path: str) -> None:
    browser.get(address)

    def is_open() -> bool:
        notebook = browser.execute_script(NOTEBOOK)
        return notebook is not None and notebook["path"] == path

    wait_for(f"{path} and its kernel", is_open)


def run_cells(browser: Any, cells: int | None = None) -> None:
    """Run the first `cells` cells of the open notebook, or all: each code cell runs, in order, without an error."""
    browser.set_script_timeout(SECONDS)
    browser.execute_script(FORGET_COUNTS)
    assert browser.execute_async_script(RUN, cells) == "ran"
    wait_for("an idle kernel", lambda: browser.execute_script(NOTEBOOK)["status"] == "idle")
    ran = [cell for cell in browser.execute_script(NOTEBOOK)["cells"][:cells] if cell["code"]]
    assert [error for cell in ran for error in cell["errors"]] == []
    assert [cell["ran"] for cell in ran] == list(range(1, len(ran) + 1))


def widget_cell(browser: Any, call: str) -> int:
    """The place of the first cell whose code has this call of a widget's function."""
    cells = browser.execute_script(NOTEBOOK)["cells"]
    places = [place for place, cell in enumerate(cells) if cell["code"] and call in cell["source"]]
    assert places, f"no cell of this chapter has {call}"
    return places[0]


def show_cell(browser: Any, cell: int) -> None:
    browser.execute_script(SHOW_CELL, cell)


def end_kernel(browser: Any) -> None:
    browser.execute_async_script(END_KERNEL)
