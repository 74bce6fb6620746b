"""Links from the chapters to the glossary: the first use of each of its words in a chapter is a link.

    python tools/glossary_links.py            prints the first uses that are no links, one a line
    python tools/glossary_links.py --write    makes them links, in the notebooks

A link looks like `[block table](glossary.md#block_table)`; the target is a heading of notebooks/glossary.md. Sentences
and tables of Markdown cells count. Titles, the banner, links to other places, folded text, longer pieces of code and
blocks of code do not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = "glossary.md"
FORMS = {
    "block_table": r"block[_ ]tables?",
    "scale-kind": r"scale kinds?|kinds? of scales?|per-tensor|per-head|per-page-head|per-token(?:-head)?",
    "page_offset": r"page[_ ]offsets?",
    "page_size": r"page[_ ]sizes?",
    "cu_seqlens": r"cu_seqlens(?:_[qk])?",
    "seq_starts": r"seq_starts",
    "head_dim": r"(?:v_)?head_dims?",
    "layout": r"layouts?|NHD|HND|SHUFFLE",
    "block": r"blocks?|block_ids?",
    "slot": r"slots?",
    "token": r"tokens?",
    "head": r"heads?|num_q_heads|num_kv_heads",
    "rank": r"ranks?",
    "all-gather": r"all[- ]gathers?",
    "tensor-parallel": r"tensor parallel(?:ism)?",
    "context-parallel": r"context parallel(?:ism)?",
}
"""The forms in which a chapter has the word of a heading. A longer form is before the one that it contains."""
_WORD = re.compile(
    "|".join(rf"(?P<{name.replace('-', '__')}>(?<![\w-])(?:{form})(?![\w-]))" for name, form in FORMS.items()),
    re.IGNORECASE,
)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_SKIPPED = re.compile(
    r"(?P<block>^```.*?^```)|(?P<folded><details.*?</details>)|(?P<title>^ {0,3}#[^\n]*)|(?P<banner>^>[^\n]*)"
    r"|(?P<indented>(?<=\n\n) {4}[^\n]*(?:\n {4}[^\n]*)*)|(?P<tag><[^>\n]*>)|(?P<math>\$[^$\n]+\$)|(?P<code>`[^`]+`)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Use:
    """A word of the glossary in a cell.

    Attributes:
        word: the glossary's heading, as an anchor.
        start, end: the characters of the cell to link, with the backticks of code.
        linked: whether they are part of a link to this word.
    """

    word: str
    start: int
    end: int
    linked: bool


def headings(text: str) -> list[str]:
    """The anchors of the glossary's words: its second-level headings, apart from those with a capital letter."""
    return [title.replace(" ", "-") for title in re.findall(r"^## ([a-z].*)$", text, re.MULTILINE)]


def uses(markdown: str) -> list[Use]:
    """The words of the glossary in a cell, in their order."""
    found: list[Use] = []
    links = {match.span(): match[1] for match in _LINK.finditer(markdown)}
    skipped = [match for match in _SKIPPED.finditer(markdown) if match.lastgroup != "code"]
    codes = [match.span() for match in _SKIPPED.finditer(markdown) if match.lastgroup == "code"]
    for match in _WORD.finditer(markdown):
        word = str(match.lastgroup).replace("__", "-")
        start, end = match.span()
        if any(part.start() <= start < part.end() for part in skipped):
            continue
        code = next(((a, b) for a, b in codes if a <= start < b), None)
        if code is not None:
            # A longer piece of code, or a constant such as `LAYOUT`, is not the word.
            if code != (start - 1, end + 1) or not re.fullmatch(FORMS[word], match[0]):
                continue
            start, end = code
        end_of_link, target = next(((b, target) for (a, b), target in links.items() if a <= start < b), (0, None))
        if target is not None and start >= end_of_link - len(target) - 1:
            continue  # in the link's target
        if target is None or target.split("#")[0] == PAGE:
            found.append(Use(word, start, end, target == f"{PAGE}#{word}"))
    return found


def first_uses(cells: Sequence[str]) -> list[tuple[int, Use]]:
    """The first use of each word in the cells of a chapter, with the cell's index; a code cell is an empty string."""
    seen: dict[str, tuple[int, Use]] = {}
    for i, text in enumerate(cells):
        for use in uses(text):
            seen.setdefault(use.word, (i, use))
    return list(seen.values())


def with_links(cells: Sequence[str]) -> list[str]:
    """The cells with a link at the first use of each word."""
    result = list(cells)
    missing = [(i, use) for i, use in first_uses(cells) if not use.linked]
    for i, use in sorted(missing, key=lambda item: item[1].start, reverse=True):
        text = result[i]
        result[i] = f"{text[: use.start]}[{text[use.start : use.end]}]({PAGE}#{use.word}){text[use.end :]}"
    return result


def markdown_cells(notebook: dict[str, Any]) -> list[str]:
    """The text of each Markdown cell, and an empty string for each other cell."""
    return ["".join(cell["source"]) if cell["cell_type"] == "markdown" else "" for cell in notebook["cells"]]


def missing(path: Path) -> list[str]:
    """The first uses in a chapter that are no links, as sentences."""
    cells = markdown_cells(json.loads(path.read_text(encoding="utf-8")))
    return [
        f"{path.name}: cell {i} has the first {cells[i][use.start : use.end]!r}, not [{cells[i][use.start : use.end]}]"
        f"({PAGE}#{use.word}): …{cells[i][max(0, use.start - 30) : use.end + 20]!r}"
        for i, use in first_uses(cells)
        if not use.linked
    ]


def write(path: Path) -> None:
    """Make links of the first uses in a chapter; the rest of the file keeps its bytes."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell, text in zip(notebook["cells"], with_links(markdown_cells(notebook)), strict=True):
        if cell["cell_type"] == "markdown":
            cell["source"] = text.splitlines(keepends=True) if isinstance(cell["source"], list) else text
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the missing links; the exit status is 1 if links are missing afterwards."""
    parser = argparse.ArgumentParser(description="links from the chapters to the glossary")
    parser.add_argument("--write", action="store_true", help="write the missing links to the notebooks")
    options = parser.parse_args(argv)
    lines = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        if options.write:
            write(path)
        lines += missing(path)
    print("\n".join(lines) or "every chapter links each word of the glossary at its first use")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
