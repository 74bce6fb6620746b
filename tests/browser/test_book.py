"""The book: it builds without a complaint, and reads well in Chromium, on a wide and on a narrow screen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By

from tests.browser.conftest import ROOT, wait_for

CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
WIDTHS = (1280, 400)
PAGES = ("index", f"notebooks/{CHAPTERS[1]}", "api/index")
SECONDS = 600  # for a build: under a minute on two idle cores

# Elements of the text that end beyond the page's right edge, and that no box of the text lets the reader scroll to.
CUT_OFF = """
document.querySelectorAll('details').forEach(details => details.open = true);
const width = document.documentElement.clientWidth;
const scrolls = element => ['auto', 'scroll'].includes(getComputedStyle(element).overflowX);
const reachable = element => {
    for (let box = element; box.tagName !== 'ARTICLE'; box = box.parentElement) if (scrolls(box)) return true;
    return false;
};
const cut = [...document.querySelectorAll('article *')].filter(
    element => element.getBoundingClientRect().right > width + 1 && !reachable(element));
return {
    page: document.documentElement.scrollWidth - width,
    cut: cut.map(element => element.outerHTML.slice(0, 100)),
};
"""


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages that `make book` writes; a complaint of the build fails every test here."""
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, str(ROOT / "tools/book.py"), "--out", str(out)]
    built = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=SECONDS)
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stderr == ""
    return out / "html"


class Pictures(HTMLParser):
    """The alt texts of a page, and how many of its cells are folded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.alts: list[str] = []
        self.folded = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            self.alts.append(given.get("alt") or "")
        self.folded += tag == "details" and "above-input" in (given.get("class") or "")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_shows_its_pictures_and_folds_its_folded_cells(book: Path, chapter: str) -> None:
    cells = json.loads((ROOT / f"notebooks/{chapter}.ipynb").read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    alts = [output["metadata"]["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    text = (book / f"notebooks/{chapter}.html").read_text("utf-8")
    page = Pictures(text)
    assert page.alts == alts
    assert page.folded == sum(cell["metadata"].get("jupyter", {}).get("source_hidden", False) for cell in cells)
    assert "[an interactive widget" not in text


def test_index_links_to_every_chapter(book: Path) -> None:
    index = (book / "index.html").read_text("utf-8")
    assert [chapter for chapter in CHAPTERS if f'href="notebooks/{chapter}.html"' not in index] == []


def test_reference_has_the_public_names_and_their_lines(book: Path) -> None:
    import kvgather

    reference = (book / "api/index.html").read_text("utf-8")
    missing = [name for name in kvgather.__all__ if f'id="kvgather.{name}"' not in reference]
    assert missing == [name for name in ("device",) if name in missing]  # a module: its page has its names
    assert 'id="kvgather.device.doctor"' in reference
    line = re.search(r'href="\.\./source/kvgather/gather/dispatch\.py\.html#L-(\d+)"', reference)
    assert line
    source = (ROOT / "kvgather/gather/dispatch.py").read_text("utf-8").splitlines()
    assert source[int(line[1]) - 1].startswith("def gather(")


def test_every_result_has_a_page_with_all_rows(book: Path) -> None:
    for path in sorted((ROOT / "benchmarks/results").glob("*.csv")):
        page = (book / f"benchmarks/{path.name}.html").read_text("utf-8")
        assert page.count("<tr>") == len(path.read_text("utf-8").splitlines())


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    """The browser, with its own size back afterwards."""
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def open_page(window: Any, book: Path, page: str, width: int) -> list[str]:
    """Show a page at a width; the messages of its console."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    window.get_log("browser")  # of earlier pages
    window.get((book / f"{page}.html").as_uri())
    return [f"{line['level']}: {line['message']}" for line in window.get_log("browser")]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_page_has_no_console_message_and_no_picture_without_a_text(
    book: Path, window: Any, page: str, width: int
) -> None:
    assert open_page(window, book, page, width) == []
    for picture in window.find_elements(By.CSS_SELECTOR, "img"):
        assert picture.get_attribute("alt").strip()
        assert int(picture.get_property("naturalWidth")) > 0
    window.execute_script("console.error('planted')")
    assert "planted" in window.get_log("browser")[0]["message"]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_cut_off(book: Path, window: Any, width: int) -> None:
    """On every page but those of source files, which are all alike."""
    pages = [path.relative_to(book).with_suffix("").as_posix() for path in sorted(book.rglob("*.html"))]
    pages = [page for page in pages if not page.startswith("source/kvgather/")] + ["source/kvgather/lab/trace.py"]
    found = {}
    for page in pages:
        open_page(window, book, page, width)
        said = window.execute_script(CUT_OFF)
        if said["page"] > 0 or said["cut"]:
            found[page] = said
    assert found == {}
    window.execute_script("document.querySelector('article h1').style.minWidth = '2000px'")
    assert window.execute_script(CUT_OFF)["cut"]


def test_dark_theme_is_dark_stays_and_keeps_pictures_readable(book: Path, window: Any) -> None:
    open_page(window, book, "index", 1280)
    for _ in range(3):  # auto, light, dark
        if window.execute_script("return document.body.dataset.theme") == "dark":
            break
        toggle = next(found for found in window.find_elements(By.CLASS_NAME, "theme-toggle") if found.is_displayed())
        toggle.click()
    assert brightness(window, "body") < 60
    open_page(window, book, f"notebooks/{CHAPTERS[1]}", 1280)
    assert brightness(window, "body") < 60
    assert brightness(window, ".cell_output img") > 200  # the figures' ink is dark
    window.execute_script("localStorage.clear()")


def brightness(window: Any, selector: str) -> float:
    """The mean of the background's red, green and blue, from 0 to 255."""
    script = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    return sum(map(float, re.findall(r"\d+", window.execute_script(script, selector))[:3])) / 3


def test_search_finds_a_word(book: Path, window: Any) -> None:
    open_page(window, book, "index", 1280)
    box = window.find_element(By.CSS_SELECTOR, ".sidebar-search")
    box.send_keys("eviction")
    box.submit()
    wait_for("the results", lambda: window.find_elements(By.CSS_SELECTOR, "#search-results ul.search li a"))
    found = [link.text for link in window.find_elements(By.CSS_SELECTOR, "#search-results ul.search li a")]
    assert any("A paged cache" in title for title in found)
    assert window.get_log("browser") == []
