"""Complaints about built HTML pages: dead links, things from a network, pictures without an alt text."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}
"""Elements that make a browser load a file, and the attribute with its address."""


class Page(HTMLParser):
    """What a page links to, loads, shows and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: list[str] = []
        self.undescribed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if given.get("id"):
            self.anchors.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADS and LOADS[tag] in given:
            self.loads.append(given[LOADS[tag]])
        if tag == "img" and not given.get("alt", "").strip():
            self.undescribed.append(given.get("src", ""))


def complaints(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder; empty if nothing is.

    Args:
        folder: with HTML pages and style sheets, at any depth. External links are not followed; only their form is
            checked.
    """
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder).as_posix()
        found += [f"{name}: {said}" for link in page.links if (said := _about_link(link, path, folder, pages))]
        found += [f"{name}: {said}" for address in page.loads if (said := _about_load(address, path, folder))]
        found += [f"{name}: the picture {source} has no alt text" for source in page.undescribed]
        repeated = sorted(anchor for anchor, count in Counter(page.anchors).items() if count > 1)
        found += [f"{name}: the anchor {anchor} exists twice" for anchor in repeated]
    for path in sorted(folder.rglob("*.css")):
        addresses = re.findall(r"url\(\s*['\"]?(?!data:)([^'\")]+)", path.read_text("utf-8"))
        name = path.relative_to(folder).as_posix()
        found += [f"{name}: {said}" for address in addresses if (said := _about_load(address, path, folder))]
    return found


def _about_link(link: str, path: Path, folder: Path, pages: dict[Path, Page]) -> str:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        good = parts.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return "" if good and not re.search(r"\s", link) else f"the link {link} is malformed"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file() or not target.is_relative_to(folder.resolve()):
        return f"the link {link} leads to no file"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return f"the link {link} leads to no anchor"
    return ""


def _about_load(address: str, path: Path, folder: Path) -> str:
    parts = urlsplit(address)
    if parts.scheme == "data":
        return ""
    if parts.scheme or parts.netloc:
        return f"loads {address} from a network"
    target = (path.parent / unquote(parts.path)).resolve()
    return "" if not parts.path or target.is_file() else f"loads {address}, which does not exist"
