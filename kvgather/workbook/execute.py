"""Run notebooks top to bottom and write them back in one normal form.

    python -m kvgather.workbook.execute [--check] notebooks/03_layouts.ipynb …

A notebook that raises, writes to stderr or leaves files in its folder fails, and is not written.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

__all__ = ["NotebookError", "execute", "main", "normalise", "run"]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_TEXT = "[an interactive widget: run this cell to use it]"
KEPT_METADATA = ("tags", "kvgather", "jupyter")


class NotebookError(ValueError):
    """A notebook raised, wrote to stderr or left files behind."""


def run(path: Path, *, timeout: int = 120) -> Any:
    """Run a notebook in a fresh kernel, in its own folder, and return it with its outputs.

    Args:
        path: the notebook file.
        timeout: seconds a single cell may take.

    Raises:
        NotebookError: a cell raised or wrote to stderr, or the notebook left files in its folder.
    """
    notebook = nbformat.read(path, as_version=4)
    before = _listing(path.parent)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # it warns about its own TCP port otherwise
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotebookError(f"{path.name}: {error}") from error
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise NotebookError(f"{path.name}: cell {number} wrote to stderr:\n{output.text}")
    leftovers = sorted(_listing(path.parent) - before)
    if leftovers:
        raise NotebookError(f"{path.name}: left files behind: {', '.join(leftovers)}")
    return notebook


def normalise(notebook: Any) -> Any:
    """Bring an executed notebook into its committed form, so that a second run gives no diff."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
        }
    )
    used: set[str] = set()
    count = 0
    for cell in notebook.cells:
        cell.id = _cell_id(cell.source, used)
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata})
        cell.source = "\n".join(line.rstrip() for line in cell.source.split("\n")).strip("\n")
        if cell.cell_type != "code":
            cell.pop("attachments", None)
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _normal_outputs(cell.outputs, count)
    return notebook


def execute(path: Path, *, write: bool = True, timeout: int = 120) -> float:
    """Run and normalise one notebook, write it back, and return the seconds it took."""
    start = time.perf_counter()
    notebook = normalise(run(path, timeout=timeout))
    seconds = time.perf_counter() - start
    nbformat.validate(notebook)
    if write:
        path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
    return seconds


def _listing(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir() if item.suffix != ".ipynb" and not item.name.startswith(".")}


def _cell_id(source: str, used: set[str]) -> str:
    """An id from the hash of the cell's text: inserting a cell does not change the other ids."""
    digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    name, extra = digest[:8], 0
    while name in used:
        extra += 1
        name = f"{digest[:8]}-{extra}"
    used.add(name)
    return name


def _normal_outputs(outputs: Sequence[Any], count: int) -> list[Any]:
    result: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and result and result[-1].get("name") == output.name:
            result[-1].text += output.text
            continue
        if output.output_type == "execute_result":
            output.execution_count = count
        if WIDGET_VIEW in output.get("data", {}):
            # A view without its widget's state renders as an error; the chapter has a static picture next to it.
            output.data = nbformat.from_dict({"text/plain": WIDGET_TEXT})
            output.metadata = nbformat.from_dict({})
        result.append(output)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks of the command line; returns 0 if all of them succeeded, else 1."""
    parser = argparse.ArgumentParser(prog="python -m kvgather.workbook.execute", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--check", action="store_true", help="run only, write nothing")
    parser.add_argument("--timeout", type=int, default=120, metavar="SECONDS", help="for a single cell (default: 120)")
    options = parser.parse_args(arguments)
    failed = 0
    for path in options.notebooks:
        try:
            seconds = execute(path.resolve(), write=not options.check, timeout=options.timeout)
        except (NotebookError, TimeoutError) as error:
            failed += 1
            print(f"FAILED  {path}\n{error}", file=sys.stderr)
        else:
            print(f"{seconds:6.1f} s  {path}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
