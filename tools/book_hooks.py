"""What the book adds to Sphinx: alt texts of figures, links from the API to the source, docstrings in Markdown."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[1]


def connect(app: Any) -> None:
    """Register the hooks."""
    app.connect("doctree-read", describe_pictures)
    # Before napoleon, which has the default priority of 500 and turns sections into reStructuredText.
    app.connect("autodoc-process-docstring", restructure, priority=100)
    app.connect("autodoc-skip-member", skip_kernels)


def describe_pictures(app: Any, doctree: nodes.document) -> None:
    """Give each picture of a notebook's output the alt text of its metadata, which MyST-NB ignores.

    Raises:
        ExtensionError: a picture has no alt text, or the pictures are not those of the notebook.
    """
    path = Path(app.env.doc2path(app.env.current_document.docname))
    if path.suffix != ".ipynb":
        return
    texts = [
        output["metadata"].get("image/png", {}).get("alt", "")
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    pictures = [
        image
        for cell in doctree.findall(lambda node: "cell_output" in getattr(node, "attributes", {}).get("classes", []))
        for image in cell.findall(nodes.image)
    ]
    if len(pictures) != len(texts) or not all(text.strip() for text in texts):
        raise ExtensionError(f"{path.name} has {len(pictures)} pictures and the alt texts {texts}")
    for picture, text in zip(pictures, texts, strict=True):
        picture["alt"] = text


def link_to_source(domain: str, info: dict[str, str]) -> str | None:
    """The page and line that define a name, relative to a page of the API."""
    if domain != "py" or not info["module"]:
        return None
    value: Any = importlib.import_module(info["module"])
    try:
        for part in info["fullname"].split("."):
            value = getattr(value, part)
    except AttributeError:  # an attribute of instances, or a field without a default
        return None
    value = inspect.unwrap(value.fget if isinstance(value, property) and value.fget else value)
    value = getattr(value, "fn", value)  # a kernel
    try:
        file, (_, line) = inspect.getsourcefile(value), inspect.getsourcelines(value)
    except (TypeError, OSError):  # a constant
        return None
    if file is None or not Path(file).is_relative_to(ROOT / "kvgather"):
        return None
    return f"../source/{Path(file).relative_to(ROOT).as_posix()}.html#L-{max(line, 1)}"


def skip_kernels(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave kernels out: their parameters are pointers and constants, described by comments."""
    return True if name.endswith("_kernel") else None


def restructure(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Turn the Markdown of a docstring into reStructuredText: `code` in backticks, indented blocks after a colon."""
    # Napoleon takes the first line of a property for "type: description"; an empty first line has no type.
    lines[:] = [""] * (what in ("attribute", "data", "property")) + restructured(joined(lines))


def joined(lines: list[str]) -> list[str]:
    """The lines, with a list of parameters on one line: napoleon reads names only up to the end of a line."""
    result: list[str] = []
    for line in lines:
        if result and re.fullmatch(r"\s+[\w, ]+,", result[-1]) and re.match(r"\s+\w", line):
            result[-1] += " " + line.strip()
        else:
            result.append(line)
    return result


def restructured(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    result: list[str] = []
    for i, line in enumerate(lines):
        if not line.strip() or in_block(lines, i):
            result.append(line)
            continue
        parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
        result.append("".join(_as_code(part) if i % 2 else _escaped(part) for i, part in enumerate(parts)))
    return [line for i, line in enumerate(result) for line in _with_marker(result, lines, i, line)]


def in_block(lines: list[str], i: int) -> bool:
    """Whether a line is code: indented after an empty line, and the text before that ends with a colon."""
    depth = len(lines[i]) - len(lines[i].lstrip())
    before = i - 1
    while before >= 0 and (not lines[before].strip() or len(lines[before]) - len(lines[before].lstrip()) >= depth):
        before -= 1
    return (
        depth > 0
        and before >= 0
        and lines[before].rstrip().endswith(":")
        and before + 1 < len(lines)
        and not lines[before + 1].strip()
    )


def _with_marker(result: list[str], lines: list[str], i: int, line: str) -> list[str]:
    following = next((j for j in range(i + 1, len(lines)) if lines[j].strip()), None)
    begins = following is not None and following > i + 1 and line.rstrip().endswith(":") and in_block(lines, following)
    return [line + ":"] if begins and not in_block(lines, i) else [line]


def _as_code(part: str) -> str:
    return f"``{part.strip('`')}``"


def _escaped(part: str) -> str:
    return re.sub(r"(?<=\w)_(?=\W|$)|[*|](?=\S)", lambda match: "\\" + match[0], part)
