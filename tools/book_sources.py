"""The book's sources: the repository's chapters, documents and results as pages that Sphinx reads.

A page keeps its file's path in the repository, so that links between chapters stay as they are. A link to any other
file, a source file for instance, becomes a link to a page that shows the file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import book_pages

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
MARK = ".book"
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kvgather/lab": "api/lab.md",
}
"""Files and folders whose page has another name."""
PLACEHOLDER = "[an interactive widget"
WIDGET = '<p class="widget-note">An interactive widget: <code>make lab</code> opens the chapter with it.</p>'
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_HREF = re.compile(r"""(<a\s[^>]*?href=["'])([^"']+)(["'])""")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


class BookError(ValueError):
    """A page cannot be made; the message names the file and the cause."""


class Sources:
    """The folder that Sphinx reads.

    Attributes:
        root, out: the repository, and the folder.
        shown: files of the repository that get a page because something links to them.
    """

    def __init__(self, out: Path, root: Path = ROOT) -> None:
        self.root, self.out = root, out
        self.shown: set[str] = set()
        self._written: set[Path] = set()

    def read(self, name: str) -> str:
        """The text of a file of the repository."""
        return (self.root / name).read_text(encoding="utf-8")

    def write(self, page: str, text: str) -> None:
        """Write a page. An unchanged page keeps its time, so that Sphinx does not read it again."""
        path = self._path(page)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")

    def copy(self, name: str) -> None:
        """Copy a file of the repository, a picture for instance."""
        path = self._path(name)
        if not path.exists() or path.read_bytes() != (self.root / name).read_bytes():
            shutil.copyfile(self.root / name, path)

    def _path(self, name: str) -> Path:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._written.add(path)
        return path

    def page_of(self, name: str) -> str:
        """The page of a file of the repository; both paths are relative to their roots."""
        if name in PAGES:
            return PAGES[name]
        if name.startswith(f"{RESULTS}/"):
            return f"benchmarks/{PurePosixPath(name).name}.md"
        if name.startswith("notebooks/") and name.endswith((".ipynb", ".md")):
            return name
        if name.startswith("docs/"):
            self.copy(name)
            return name
        self.shown.add(name)
        return f"source/{name}.md"

    def relinked(self, markdown: str, source: str, page: str) -> str:
        """Markdown whose relative links lead to pages of the book.

        Args:
            markdown: the text of a file, or of one cell.
            source: the file's path in the repository.
            page: the path of the page that gets the text.

        Raises:
            BookError: a link leads to a file that does not exist.
        """

        def target(match: re.Match[str]) -> str:
            return match[1] + self._target(match[2], source, page) + match[3]

        # Every second part is code.
        parts = [part if i % 2 else _LINK.sub(target, part) for i, part in enumerate(_CODE.split(markdown))]
        return "".join(part if i % 2 else self.relinked_html(part, source, page) for i, part in enumerate(parts))

    def relinked_html(self, text: str, source: str, page: str) -> str:
        """HTML whose relative links lead to pages of the book; the arguments and errors are those of `relinked`."""

        def target(match: re.Match[str]) -> str:
            path, mark, fragment = self._target(match[2], source, page).partition("#")
            # Sphinx does not read HTML: the link has the name of the built page.
            built = path if ":" in path else re.sub(r"\.(md|ipynb)$", ".html", path)
            return f"{match[1]}{built}{mark}{fragment}{match[3]}"

        return _HREF.sub(target, text)

    def _target(self, link: str, source: str, page: str) -> str:
        """The link to the page of what a link leads to; links to other sites and inside a page stay as they are."""
        path, _, fragment = link.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link
        name = _joined(PurePosixPath(source).parent, path)
        if not (self.root / name).exists():
            raise BookError(f"{source} links to {path}, which does not exist")
        new = os.path.relpath(self.page_of(name), os.path.dirname(page) or ".").replace(os.sep, "/")
        # Pages of source files have anchors of their own.
        return f"{new}#{fragment}" if fragment and name.endswith((".md", ".ipynb")) else new

    def begin(self) -> None:
        """Create the folder.

        Raises:
            BookError: the folder exists and is not the book's; `drop_others` would delete its files.
        """
        if self.out.exists() and any(self.out.iterdir()) and not (self.out / MARK).exists():
            raise BookError(f"{self.out} has files that do not belong to the book; accepted: another folder")
        self.write(MARK, "Written by tools/book.py, which deletes other files in this folder.\n")

    def drop_others(self) -> None:
        """Delete pages of an earlier build that this one did not write."""
        for path in sorted(self.out.rglob("*"), reverse=True):
            if path.is_file() and path not in self._written:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _joined(folder: PurePosixPath, link: str) -> str:
    return os.path.normpath(folder / link).replace(os.sep, "/")


def assemble(out: Path, root: Path = ROOT) -> None:
    """Write every page of the book.

    Args:
        out: a folder; files in it that do not belong to the book are deleted.
        root: the repository.

    Raises:
        BookError: a link leads nowhere, the README has no measurements, or the folder has other files.
    """
    sources = Sources(out, root)
    sources.begin()
    sources.write("index.md", sources.relinked(sources.read("book/index.md"), "book/index.md", "index.md"))
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        name = f"notebooks/{path.name}"
        sources.write(name, chapter(sources, name))
    for name in ("notebooks/glossary.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        page = sources.page_of(name)
        sources.write(page, sources.relinked(sources.read(name), name, page))
    write_benchmarks(sources)
    sources.write("api/index.md", book_pages.public_page())
    for page, text in book_pages.lab_pages().items():
        sources.write(page, text)
    # The reference links to every module that defines a documented name.
    sources.shown |= {path.relative_to(root).as_posix() for path in (root / "kvgather").rglob("*.py")}
    for name in sorted(sources.shown):
        sources.write(f"source/{name}.md", book_pages.source_page(name, sources.read(name)))
    sources.drop_others()


def write_benchmarks(sources: Sources) -> None:
    """The page of measurements, which is the README's section, and a page for each file of results."""
    measured = re.search(r"^## Measured\n(.*?)(?=^## )", sources.read("README.md"), re.MULTILINE | re.DOTALL)
    if measured is None:
        raise BookError("README.md has no section 'Measured'")
    without_comments = re.sub(r"<!--.*?-->", "", measured[1], flags=re.DOTALL)
    lines = ["# Benchmarks", "", sources.relinked(without_comments, "README.md", "benchmarks/index.md")]
    lines += ["## All rows", "", "```{toctree}", ":maxdepth: 1", ""]
    for path in sorted((sources.root / RESULTS).iterdir()):
        if path.suffix in (".csv", ".json"):
            name = f"{RESULTS}/{path.name}"
            sources.copy(name)
            sources.write(sources.page_of(name), book_pages.results_page(name, sources.read(name)))
            lines.append(path.name)
    sources.write("benchmarks/index.md", "\n".join([*lines, "```", ""]))


def chapter(sources: Sources, name: str) -> str:
    """The JSON of a notebook as the book shows it: links lead to pages, folded cells are folded, a widget is a note.

    Args:
        sources: of the book.
        name: the notebook's path in the repository.

    Raises:
        BookError: a link leads nowhere.
    """
    notebook = json.loads(sources.read(name))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = sources.relinked(source, name, name)
        elif cell["cell_type"] == "code":
            if cell["metadata"].get("jupyter", {}).get("source_hidden"):
                cell["metadata"].setdefault("tags", []).append("hide-input")
            outputs = (without_view(output, progress="progress(" in source) for output in cell["outputs"])
            cell["outputs"] = [output for output in outputs if output is not None]
            for data in (output.get("data", {}) for output in cell["outputs"]):
                if "text/html" in data:
                    data["text/html"] = sources.relinked_html("".join(data["text/html"]), name, name)
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def without_view(output: dict[str, Any], *, progress: bool) -> dict[str, Any] | None:
    """An output without a live view: a widget's placeholder becomes a note, a progress bar's is dropped.

    Args:
        output: an output of a cell.
        progress: whether the cell shows a progress bar, whose placeholder is the same as a widget's.
    """
    if not "".join(output.get("data", {}).get("text/plain", "")).startswith(PLACEHOLDER):
        return output
    return None if progress else {"output_type": "display_data", "metadata": {}, "data": {"text/html": WIDGET}}
