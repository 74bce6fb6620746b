"""Chapter 00's map: a table of all chapters, from their banners, with the exercises that the reader has solved."""

from __future__ import annotations

from kvgather.workbook import launch
from kvgather.workbook.progress import ProgressError, overview, reader_folder, solved
from kvgather.workbook.tables import Link, table

HEADERS = ["chapter", "minutes", "GPU needed?", "solved", "you will be able to"]


def chapter_map() -> None:
    """Display the map, and the reason if the record of solved exercises cannot be used.

    Raises:
        LaunchError: the package is not in a clone, which has the chapters.
        ChapterError: a notebook of the clone is not a chapter.
    """
    folder = reader_folder()
    try:
        names = solved(folder) if folder is not None else frozenset[str]()
    except (ProgressError, OSError) as error:
        print(f"note: {error}")
        names = frozenset()
    rows = []
    for row in overview(launch.find_root(), names):
        chapter = row.chapter
        link = Link(f"{chapter.number} · {chapter.title}", chapter.file)
        rows.append((link, chapter.minutes, "yes" if chapter.needs_gpu else "no", row.text, chapter.abilities))
    table(rows, HEADERS, wrapped=HEADERS[-1:])
