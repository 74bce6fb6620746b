"""Generated pages of the book: source files, tables of results, and the reference, whose text is in docstrings."""

from __future__ import annotations

import csv
import html
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pygments
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

RETURNED = [
    ("blocks.pool.PooledSequence", "autoclass"),
    ("blocks.pool.PoolStats", "autoclass"),
    ("blocks.pool.BlockView", "autoclass"),
]
"""What public functions return and callers read, with autodoc's directive."""


def source_page(name: str, text: str) -> str:
    """A page that shows a file, with an anchor for each line: `#L-12`."""
    try:
        lexer = get_lexer_for_filename(name)
    except ClassNotFound:
        lexer = TextLexer()
    shown = pygments.highlight(text, lexer, HtmlFormatter(lineanchors="L", anchorlinenos=True, linenos="inline"))
    return f'---\norphan: true\n---\n# {name}\n\n```{{raw}} html\n<div class="source-lines">{shown}</div>\n```\n'


def results_page(name: str, text: str) -> str:
    """A page that shows a file of results, with a link that downloads it.

    Args:
        name: the file's path in the repository, `benchmarks/results/NAME.csv` or `.json`.
        text: the file's text.
    """
    path = Path(name)
    body = csv_table(text) if path.suffix == ".csv" else f"```json\n{text}```"
    return f"# {path.stem}\n\nThe file: {{download}}`{path.name} <results/{path.name}>`.\n\n{body}\n"


def csv_table(text: str) -> str:
    """Rows of a CSV as an HTML table; a column whose value never changes is a sentence above the table."""
    header, *rows = list(csv.reader(text.splitlines()))
    constant = {i for i in range(len(header)) if len(rows) > 1 and len({row[i] for row in rows}) == 1}
    kept = [i for i in range(len(header)) if i not in constant]
    said = ", ".join(f"{header[i]}: {rows[0][i]}" for i in sorted(constant) if rows[0][i] not in ("", "0.0"))
    head = "".join(f"<th>{html.escape(header[i])}</th>" for i in kept)
    body = "\n".join("<tr>" + "".join(_cell(row[i]) for i in kept) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    count = f"{len(rows)} rows. In all of them {said}." if said else f"{len(rows)} rows."
    return f'{count}\n\n```{{raw}} html\n<div class="table-scroll" tabindex="0">{table}</div>\n```'


def _cell(value: str) -> str:
    number = re.fullmatch(r"-?\d[\d.]*(e[+-]?\d+)?", value)
    return f"<td{' class=number' if number else ''}>{html.escape(value)}</td>"


def public_page() -> str:
    """The page of the package's public names."""
    package = importlib.import_module("kvgather")
    blocks = ["# kvgather", "", "The public names: `import kvgather as kg`.", ""]
    for title, chosen in (public_names(package) | {"Objects that these return": RETURNED}).items():
        blocks += [f"## {title}", ""]
        for name, directive in chosen:
            blocks += ["```{eval-rst}", f".. {directive}:: kvgather.{name}"]
            if directive == "automodule":  # without the names that are on this page already
                twice = set(package.__all__) & set(getattr(package, name).__all__)
                blocks += [f"   :exclude-members: {', '.join(sorted(twice))}"] if twice else []
            blocks += ["```", ""]
    return "\n".join(blocks)


def public_names(package: Any) -> dict[str, list[tuple[str, str]]]:
    """The names in `__all__` with autodoc's directive for each, by kind."""
    found: dict[str, list[tuple[str, str]]] = {"Classes": [], "Functions": [], "Exceptions": [], "Modules": []}
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.ismodule(value):
            found["Modules"].append((name, "automodule"))
        elif inspect.isclass(value) and issubclass(value, Exception):
            found["Exceptions"].append((name, "autoexception"))
        elif inspect.isclass(value):
            found["Classes"].append((name, "autoclass"))
        else:
            found["Functions"].append((name, "autofunction"))
    return {title: names for title, names in found.items() if names}


def lab_pages() -> dict[str, str]:
    """The page of the lab and one for each module in its `__all__`; the keys are paths in the book."""
    lab = importlib.import_module("kvgather.lab")
    blocks = ["# kvgather.lab", "", inspect.getdoc(lab) or "", "", "```{toctree}", ":maxdepth: 1", ""]
    pages = {}
    for name in lab.__all__:
        blocks.append(f"lab.{name}")
        pages[f"api/lab.{name}.md"] = (
            f"# kvgather.lab.{name}\n\n```{{eval-rst}}\n.. automodule:: kvgather.lab.{name}\n```\n"
        )
    return {"api/lab.md": "\n".join([*blocks, "```", ""])} | pages
