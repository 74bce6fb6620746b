"""The book: the chapters, the reference and the measurements as static HTML. `make book` runs this.

    python tools/book.py                 writes book/_build/html/index.html
    python tools/book.py --out FOLDER    writes FOLDER/html/index.html

Nothing is executed: the chapters show the outputs that are committed. A warning of Sphinx is an error, and so is a link
that leads nowhere, a picture without an alt text, or a page that loads something from a network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import book_check
import book_sources
from gpu_record import with_path

ROOT = Path(__file__).resolve().parents[1]


def build(out: Path) -> int:
    """Write the sources, run Sphinx over them, and check its pages.

    Args:
        out: a folder; gets `source`, `doctrees` and `html`.

    Returns:
        The exit status: 0 if there is no warning and no complaint.
    """
    try:
        book_sources.assemble(out / "source")
    except book_sources.BookError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return 1
    # Warnings are errors, and all of them are printed.
    sphinx = [sys.executable, "-m", "sphinx", "-M", "html", str(out / "source"), str(out), "-c", str(ROOT / "book")]
    options = ["-W", "--keep-going", "-q", "-j", "2"]
    status = subprocess.run([*sphinx, *options], env=with_path(ROOT), check=False).returncode
    if status:
        return status
    complaints = book_check.complaints(out / "html")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return int(bool(complaints))


def main(argv: Sequence[str] | None = None) -> int:
    """Build the book; returns the exit status."""
    parser = argparse.ArgumentParser(description="build the book")
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "_build", help="where to write (book/_build)")
    out = parser.parse_args(argv).out.resolve()
    start = time.monotonic()
    status = build(out)
    if not status:
        print(f"{out / 'html' / 'index.html'}, in {time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
