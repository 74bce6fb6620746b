"""Text files of results, replaced atomically: a full disk or Ctrl-C never leaves a truncated file."""

from __future__ import annotations

import csv
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """The text of a CSV file with a header and these rows; values under names that are no columns are left out."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; replaces the file at `path`.

    Raises:
        OSError: the file cannot be written; the file at `path` is unchanged.
    """
    target = path.resolve()  # writes through a symbolic link
    if target.exists() and not target.is_file():  # a pipe or a device cannot be renamed over
        target.write_text(text, encoding="utf-8", newline="")
        return
    temporary = _temporary(target)
    file = temporary.open("x", encoding="utf-8", newline="")
    try:
        with file:
            file.write(text)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def check_replaceable(path: Path) -> None:
    """Raise early, before a long run, the errors that `replace_text` would raise after it.

    Raises:
        OSError: no file can be written at `path`.
    """
    target = path.resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; accepted: the name of a file")
    if target.exists() and not target.is_file():
        return
    temporary = _temporary(target)
    temporary.touch(exist_ok=False)
    temporary.unlink()


def _temporary(target: Path) -> Path:
    """A name that no other thread, process or machine uses."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")
