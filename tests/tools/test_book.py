"""The book's parts: links, cells, tables and docstrings become pages, and the check finds bad pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import book_check
import book_hooks
import book_pages
import book_sources
import pytest
from book_sources import BookError, Sources

from kvgather import lab

ROOT = Path(__file__).resolve().parents[2]
GOOD = '<html><head><link href="a.css"></head><body id="top"><img src="a.png" alt="a line"><a href="#top">up</a>'


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "source")


def test_links_lead_to_pages(sources: Sources) -> None:
    text = (
        "[a](01_paged_cache.ipynb) [b](../kvgather/cache.py) [c](../benchmarks/results/gather_h100.csv) [d](#here) "
        "[e](https://a.org/x#y) [f](glossary.md#slot) [g](../README.md) `[h](x.py)`\n```\n[i](x.py)\n```"
    )
    name = "notebooks/04_first_gather.ipynb"
    assert sources.relinked(text, name, name) == (
        "[a](01_paged_cache.ipynb) [b](../source/kvgather/cache.py.md) [c](../benchmarks/gather_h100.csv.md) "
        "[d](#here) [e](https://a.org/x#y) [f](glossary.md#slot) [g](../index.md) `[h](x.py)`\n```\n[i](x.py)\n```"
    )
    assert sources.shown == {"kvgather/cache.py"}
    moved = sources.relinked("[a](notebooks/00_start_here.ipynb)", "README.md", "benchmarks/index.md")
    assert moved == "[a](../notebooks/00_start_here.ipynb)"


def test_dead_link_raises(sources: Sources) -> None:
    with pytest.raises(BookError, match=r"a/b\.md links to \.\./gone\.py, which does not exist"):
        sources.relinked("[x](../gone.py)", "a/b.md", "a/b.md")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BookError, match="files that do not belong to the book"):
        book_sources.assemble(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_old_pages_go_and_unchanged_pages_keep_their_time(tmp_path: Path) -> None:
    first = Sources(tmp_path)
    first.begin()
    first.write("a/old.md", "old")
    first.write("kept.md", "kept")
    before = (tmp_path / "kept.md").stat().st_mtime_ns
    second = Sources(tmp_path)
    second.begin()
    second.write("kept.md", "kept")
    second.drop_others()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".book", "kept.md"]
    assert (tmp_path / "kept.md").stat().st_mtime_ns == before


def test_folded_cells_widgets_and_links_of_a_chapter(tmp_path: Path) -> None:
    view = {"output_type": "display_data", "metadata": {}, "data": {"text/plain": ["[an interactive widget: run"]}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["1\n"]}
    link = '<td><a href="01_b.ipynb#x">'
    table = {"output_type": "display_data", "metadata": {}, "data": {"text/html": [link, '<a href="https://a.org">']}}
    cells = [
        {"cell_type": "code", "metadata": {"jupyter": {"source_hidden": True}}, "source": "f()", "outputs": [view]},
        {"cell_type": "code", "metadata": {"tags": ["a"]}, "source": "progress(x)", "outputs": [view, printed]},
        {"cell_type": "code", "metadata": {}, "source": "table()", "outputs": [table]},
        {"cell_type": "markdown", "metadata": {}, "source": ["[b](01_b.ipynb)\n", link]},
    ]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/00_a.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "notebooks/01_b.ipynb").touch()
    sources = Sources(tmp_path / "out", tmp_path)
    shown = json.loads(book_sources.chapter(sources, "notebooks/00_a.ipynb"))["cells"]
    assert shown[0]["metadata"]["tags"] == ["hide-input"]
    assert "make lab" in shown[0]["outputs"][0]["data"]["text/html"]
    assert shown[1]["metadata"]["tags"] == ["a"]
    assert shown[1]["outputs"] == [printed]
    built = '<td><a href="01_b.html#x">'
    assert shown[2]["outputs"][0]["data"]["text/html"] == built + '<a href="https://a.org">'
    assert shown[3]["source"] == "[b](01_b.ipynb)\n" + built


def test_table_tells_constant_columns_once() -> None:
    table = book_pages.csv_table("case,gpu,us,empty\na<b,H100,1.5,\nc,H100,-,\n")
    assert table.startswith("2 rows. In all of them gpu: H100.\n")
    assert "<th>case</th><th>us</th></tr>" in table
    assert "<tr><td>a&lt;b</td><td class=number>1.5</td></tr>" in table


def test_page_of_a_file_has_an_anchor_for_each_line() -> None:
    page = book_pages.source_page("a/b.py", "x = 1\ny = 2\n")
    assert "# a/b.py\n" in page and 'id="L-1"' in page and 'id="L-2"' in page
    assert 'id="L-1"' in book_pages.source_page("LICENSE", "MIT\n")  # a name that no lexer knows


def test_the_public_modules_of_the_lab_have_pages_and_no_others() -> None:
    pages = book_pages.lab_pages()
    assert set(pages) == {"api/lab.md"} | {f"api/lab.{name}.md" for name in lab.__all__}
    assert "\nlab.trace\n" in pages["api/lab.md"] and "lab.child" not in pages["api/lab.md"]
    assert "automodule:: kvgather.lab.trace\n" in pages["api/lab.trace.md"]


def test_modules_of_the_lab_that_readers_meet_are_public() -> None:
    """In code of the chapters, in the README and in the CHANGELOG. ARCHITECTURE.md lists the public ones."""
    chapters = [json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    code = "\n".join("".join(cell["source"]) for book in chapters for cell in book["cells"])
    imported = re.findall(r"from kvgather\.lab\.(\w+)", code)
    for names in re.findall(r"from kvgather\.lab import (.+)", code):
        imported += names.split(", ")
    documents = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "CHANGELOG.md"))
    imported += re.findall(r"kvgather[./]lab[./](\w+)", documents)
    assert len(set(imported)) > 8 and set(imported) <= set(lab.__all__)
    drawing = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    (listed,) = re.findall(r"the public modules are\n +(.+)\n", drawing)
    assert listed.split(", ") == lab.__all__


DOCSTRINGS = [
    ("`x` is *x, and x_ too", r"``x`` is \*x, and x\_ too"),
    ("An example:\n\n    `a` * b\n\nThen `b`.", "An example::\n\n    `a` * b\n\nThen ``b``."),
    ("Args:\n    a: `b`:\n        c.", "Args:\n    a: ``b``:\n        c."),
]


@pytest.mark.parametrize(("markdown", "expected"), DOCSTRINGS)
def test_docstrings_become_restructured_text(markdown: str, expected: str) -> None:
    assert book_hooks.restructured(markdown.split("\n")) == expected.split("\n")


def test_names_of_arguments_come_to_one_line() -> None:
    lines = ["Args:", "    a, b,", "        c: three.", "    d: one,", "        and more."]
    assert book_hooks.joined(lines) == ["Args:", "    a, b, c: three.", "    d: one,", "        and more."]


def test_names_link_to_their_lines() -> None:
    def link(module: str, name: str) -> str | None:
        return book_hooks.link_to_source("py", {"module": module, "fullname": name})

    for module, name, text in (
        ("kvgather", "gather", "def gather("),
        ("kvgather", "BlockPool.allocate", "    def allocate("),
        ("kvgather", "PagedKVCache.likeness", "    @property"),
    ):
        found = link(module, name)
        assert found
        page, line = found.removeprefix("../source/").split(".html#L-")
        assert (ROOT / page).read_text("utf-8").splitlines()[int(line) - 1].startswith(text)
    assert link("kvgather.lab.trace", "Access.width") is None
    assert link("kvgather.lab.fence", "GUARD_BYTES") is None


def test_pictures_need_their_alt_texts(tmp_path: Path) -> None:
    from docutils import nodes
    from docutils.utils import new_document
    from sphinx.errors import ExtensionError

    def described(alts: list[str], pictures: int) -> list[str]:
        outputs = [{"data": {"image/png": ""}, "metadata": {"image/png": {"alt": alt}}} for alt in alts]
        path = tmp_path / "a.ipynb"
        path.write_text(json.dumps({"cells": [{"outputs": outputs}, {}]}))
        environment = SimpleNamespace(doc2path=lambda name: path, current_document=SimpleNamespace(docname="a"))
        document = new_document("a")
        document += nodes.container("", *(nodes.image() for _ in range(pictures)), classes=["cell_output"])
        book_hooks.describe_pictures(SimpleNamespace(env=environment), document)
        return [picture["alt"] for picture in document.findall(nodes.image)]

    assert described(["a line", "a dot"], 2) == ["a line", "a dot"]
    for alts, pictures in ((["a line", " "], 2), (["a line"], 2), (["a line", "a dot"], 1)):
        with pytest.raises(ExtensionError, match="alt texts"):
            described(alts, pictures)


def pages(folder: Path, body: str) -> list[str]:
    """The complaints about a page, in a folder with a style sheet, a picture and another page."""
    (folder / "a.css").write_text("p { background: url('a.png') url(data:x) }")
    (folder / "a.png").touch()
    (folder / "b.html").write_text('<p id="b">')
    (folder / "a.html").write_text(GOOD + body)
    return book_check.complaints(folder)


def test_good_page_has_no_complaint(tmp_path: Path) -> None:
    body = '<a href="b.html#b"></a><a href="https://a.org/x?y#z"></a><script src="a.css?v=1"></script>'
    assert pages(tmp_path, body) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="gone.html">x</a>', "leads to no file"),
        ('<a href="../a.html">x</a>', "leads to no file"),
        ('<a href="b.html#gone">x</a>', "leads to no anchor"),
        ('<a href="#gone">x</a>', "leads to no anchor"),
        ('<a href="https://no host/x">x</a>', "is malformed"),
        ('<a href="http:/a.org">x</a>', "is malformed"),
        ('<a href="javascript:x">x</a>', "is malformed"),
        ('<script src="https://cdn.a.org/x.js"></script>', "from a network"),
        ('<script src="//cdn.a.org/x.js"></script>', "from a network"),
        ('<img src="https://a.org/x.png" alt="x">', "from a network"),
        ('<img src="gone.png" alt="x">', "does not exist"),
        ('<img src="a.png">', "no alt text"),
        ('<img src="a.png" alt=" ">', "no alt text"),
        ('<p id="top">', "exists twice"),
    ],
)
def test_bad_page_is_found(tmp_path: Path, body: str, said: str) -> None:
    (complaint,) = pages(tmp_path, body)
    assert complaint.startswith("a.html: ") and said in complaint


def test_style_sheet_that_loads_from_a_network_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("@import url(https://a.org/font.css);")
    assert book_check.complaints(tmp_path) == ["x.css: loads https://a.org/font.css from a network"]
