"""Tables reach the notebook as HTML that does not wrap, with the same table as aligned text."""

from __future__ import annotations

import pytest

from kvgather.workbook import tables
from kvgather.workbook.tables import Link, is_house_table, table_html, table_text

ROWS = [("a", 1, 0.123456), ("long", 1_000, None)]
HEADERS = ["name", "n", "error"]


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list:
    calls: list = []
    monkeypatch.setattr(tables, "display", lambda *args, **options: calls.append((args, options)))
    return calls


def test_a_table_is_displayed_as_html_and_as_text(displayed):
    tables.table(iter(ROWS), HEADERS)
    data = {"text/html": table_html(ROWS, HEADERS), "text/plain": table_text(ROWS, HEADERS)}
    assert displayed == [((data,), {"raw": True})]


def test_text_aligns_numbers_to_the_right():
    assert table_text(ROWS, HEADERS) == (
        "name       n    error\n------  ----  -------\na          1   0.1235\nlong    1000        –"
    )
    assert table_text([("5.0 %",), ("12.5 %",)], ["share"]).endswith("\n  5.0 %\n 12.5 %")
    assert table_text([], ["a", "bc"]) == "a    bc\n---  ----"


def test_html_aligns_numbers_to_the_right_and_never_wraps():
    lines = table_html(ROWS, HEADERS).split("\n")
    assert '<td style="text-align:left;white-space:nowrap">long</td>' in lines
    assert '<td style="text-align:right;white-space:nowrap">0.1235</td>' in lines
    assert '<th style="text-align:right;white-space:nowrap">n</th>' in lines
    cells = [line for line in lines if line.startswith(("<td", "<th "))]
    assert len(cells) == 9 and all("white-space:nowrap" in cell for cell in cells)


def test_html_sets_no_color():
    assert "color" not in table_html(ROWS, HEADERS) and "background" not in table_html(ROWS, HEADERS)


def test_html_escapes_text():
    text = table_html([("a < b & c", Link("<x>", 'a"b.ipynb'))], ["<script>", "link"])
    assert "a &lt; b &amp; c" in text and "&lt;script&gt;" in text
    assert '<a href="a&quot;b.ipynb">&lt;x&gt;</a>' in text
    assert is_house_table(text)


def test_a_link_is_its_text_in_plain_text():
    assert table_text([(Link("01 · Blocks", "01_blocks.ipynb"),)], ["chapter"]).endswith("01 · Blocks")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells; accepted: 2, one for each header"):
        table_text([(1, 2), (3,)], ["a", "b"])
    with pytest.raises(ValueError, match="accepted: 1"):
        table_html([(1, 2)], ["a"])


@pytest.mark.parametrize(
    "text",
    [
        "<table></table>",
        table_html(ROWS, HEADERS).replace("left", "center"),
        table_html(ROWS, HEADERS).replace("long", "<script>1</script>"),
        table_html(ROWS, HEADERS) + "<p>more</p>",
        "",
    ],
)
def test_other_html_is_no_house_table(text):
    assert is_house_table(table_html(ROWS, HEADERS))
    assert not is_house_table(text)


def test_a_column_of_sentences_may_wrap():
    rows, headers = [("a", "word " * 30)], ["name", "story"]
    text = table_html(rows, headers, wrapped=["story"])
    assert text.count("white-space:normal") == 2 and text.count("white-space:nowrap") == 2
    assert is_house_table(text)
    assert max(map(len, table_text(rows, headers, wrapped=["story"]).split("\n"))) <= 70
    with pytest.raises(ValueError, match="wrapped has 'tale'; accepted: 'name', 'story'"):
        table_html(rows, headers, wrapped=["tale"])
