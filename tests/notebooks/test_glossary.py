"""The glossary: its words are those of the tool, each is explained, and chapters link them at their first use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import glossary_links
import pytest

from tests.notebooks.hygiene import CHAPTERS, FOLDER

GLOSSARY = (FOLDER / "glossary.md").read_text("utf-8")


def test_each_word_has_a_section_and_its_forms() -> None:
    found = glossary_links.headings(GLOSSARY)
    assert sorted(found) == sorted(glossary_links.FORMS)
    for heading in found:
        assert re.search(glossary_links.FORMS[heading], heading.replace("-", " "))


def test_links_inside_the_glossary_lead_to_its_sections() -> None:
    targets = set(re.findall(r"\]\(#([^)]+)\)", GLOSSARY))
    assert targets and targets <= set(glossary_links.headings(GLOSSARY))


def test_every_chapter_links_the_first_use_of_each_word() -> None:
    assert [line for path in CHAPTERS for line in glossary_links.missing(path)] == []


USED = {
    "A pool of blocks, a pool.": [("block", "blocks")],
    "The **block table** of a sequence.": [("block_table", "block table")],
    "`head_dim` numbers": [("head_dim", "`head_dim`")],
    "per-tensor or per-page-head": [("scale-kind", "per-tensor"), ("scale-kind", "per-page-head")],
    "Slots, and the\nlayout": [("slot", "Slots"), ("layout", "layout")],
    "## The slot\n> a slot\n\n<details>slot</details> `slot = 1` `SLOT` [a slot](01_x.ipynb)": [],
    "```python\nslot\n```\n\n    slot + 1\n\nblockade, overhead, `slots[i]`, thread-block": [],
}


@pytest.mark.parametrize("text", USED)
def test_uses_of_words_are_found(text: str) -> None:
    assert [(use.word, text[use.start : use.end]) for use in glossary_links.uses(text)] == USED[text]


def test_a_link_counts_only_at_the_first_use_and_to_the_right_word() -> None:
    linked = "A [slot](glossary.md#slot), then another slot."
    assert [use.linked for _, use in glossary_links.first_uses([linked])] == [True]
    assert glossary_links.with_links([linked]) == [linked]
    late = "A slot, then a [slot](glossary.md#slot)."
    assert [use.linked for _, use in glossary_links.first_uses([late])] == [False]
    wrong = "A [slot](glossary.md#block)."
    assert [use.linked for _, use in glossary_links.first_uses([wrong])] == [False]


def test_missing_links_are_written(tmp_path: Path) -> None:
    texts = ["# 07 · Slots\n> a slot", "Each **slot** of a `block_table` row, and a slot.\n", "| layout |\n"]
    cells = [{"cell_type": "markdown", "source": text.splitlines(keepends=True)} for text in texts]
    cells.insert(2, {"cell_type": "code", "source": ["block = slot"]})
    path = tmp_path / "07_slots.ipynb"
    path.write_text(json.dumps({"cells": cells}), "utf-8")
    assert [line.split("'")[1] for line in glossary_links.missing(path)] == ["slot", "`block_table`", "layout"]
    glossary_links.write(path)
    assert glossary_links.missing(path) == []
    assert glossary_links.markdown_cells(json.loads(path.read_text("utf-8"))) == [
        texts[0],
        "Each **[slot](glossary.md#slot)** of a [`block_table`](glossary.md#block_table) row, and a slot.\n",
        "",
        "| [layout](glossary.md#layout) |\n",
    ]
