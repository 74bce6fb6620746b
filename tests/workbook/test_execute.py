"""Notebooks are run in a fresh kernel and come back in one normal form, or not at all."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kvgather.workbook.execute import WIDGET_TEXT, WIDGET_VIEW, NotebookError, execute, main, normalise


def notebook(*sources: str) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_code_cell(source) for source in sources])


def write(path: Path, *sources: str) -> Path:
    nbformat.write(notebook(*sources), path)
    return path


def test_a_notebook_is_executed_and_a_second_run_changes_nothing(tmp_path, capsys):
    path = write(tmp_path / "a.ipynb", "import os\nx = 20", "print(os.listdir())", "x + 1")
    assert main([str(path)]) == 0
    first = path.read_bytes()
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.execution_count for cell in cells] == [1, 2, 3]
    assert cells[1].outputs[0].text == "['a.ipynb']\n" and cells[2].outputs[0].data == {"text/plain": "21"}
    assert first.endswith(b"}\n") and not first.endswith(b"\n\n")
    assert capsys.readouterr().out.strip().endswith("a.ipynb")
    execute(path)
    assert path.read_bytes() == first


def test_failing_notebooks_are_named_and_stay_as_they_are(tmp_path, capsys):
    raising = write(tmp_path / "raising.ipynb", "1 / 0")
    warning = write(tmp_path / "warning.ipynb", "import warnings\nwarnings.warn('old')")
    leaving = write(tmp_path / "leaving.ipynb", "open('left.txt', 'w').close()")
    before = [path.read_bytes() for path in (raising, warning, leaving)]
    assert main([str(raising), str(warning), str(leaving)]) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "warning.ipynb: cell 0 wrote to stderr:" in said
    assert "leaving.ipynb: left files behind: left.txt" in said
    assert [path.read_bytes() for path in (raising, warning, leaving)] == before


def test_check_writes_nothing(tmp_path):
    path = write(tmp_path / "a.ipynb", "print(1)")
    before = path.read_bytes()
    assert main(["--check", str(path)]) == 0
    assert path.read_bytes() == before


def test_a_cell_that_takes_too_long_fails(tmp_path):
    path = write(tmp_path / "slow.ipynb", "import time; time.sleep(30)")
    assert main(["--timeout", "1", str(path)]) == 1


def test_the_normal_form():
    view = new_output("display_data", data={WIDGET_VIEW: {"model_id": "1f"}, "text/plain": "VBox(children=())"})
    lines = [new_output("stream", name="stdout", text=text) for text in ("a\n", "b\n")]
    code = new_code_cell("x  \n", execution_count=9, outputs=[*lines, view])
    code.metadata = nbformat.from_dict({"tags": ["t"], "execution": {"iopub.execute_input": "now"}, "collapsed": True})
    raw = new_notebook(cells=[new_markdown_cell("text"), code, new_code_cell("y"), new_code_cell("y")])
    raw.metadata = nbformat.from_dict({"widgets": {}, "kernelspec": {"name": "mine", "display_name": "Mine"}})
    result = normalise(raw)
    assert set(result.metadata) == {"kernelspec", "language_info"} and result.metadata.kernelspec.name == "python3"
    cell = result.cells[1]
    assert (cell.source, cell.execution_count, dict(cell.metadata)) == ("x", 1, {"tags": ["t"]})
    assert cell.outputs[0].text == "a\nb\n"
    assert cell.outputs[1].data == {"text/plain": WIDGET_TEXT}
    assert len({cell.id for cell in result.cells}) == 4
    nbformat.validate(result)


def test_ids_stay_when_a_cell_is_put_in():
    few, more = normalise(notebook("a", "b")), normalise(notebook("new", "a", "b"))
    assert [cell.id for cell in more.cells[1:]] == [cell.id for cell in few.cells]


def test_an_error_is_a_value_error():
    assert issubclass(NotebookError, ValueError)
