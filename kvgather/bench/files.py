"""Files of results: written next to the old one and renamed, so that a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks") / "results"


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, in place of the one at `path` if there is one.

    Raises:
        OSError: it cannot be written; what was at `path` is as it was.
    """
    target = path.resolve()  # of a link, the file that it names
    if target.exists() and not target.is_file():  # a pipe or a device: nothing there to keep
        target.write_text(text, encoding="utf-8", newline="")
        return
    beside = _beside(target)
    try:
        with beside.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:  # Ctrl-C too
        beside.unlink(missing_ok=True)
        raise


def check_replaceable(path: Path) -> None:
    """Raise now what `replace_text` would raise later, as far as that can be known.

    Raises:
        OSError: no file can be written there.
    """
    target = path.resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; accepted: the name of a file")
    if target.exists() and not target.is_file():
        return
    beside = _beside(target)
    try:
        beside.touch(exist_ok=False)
    finally:
        beside.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


def find_results() -> Path:
    """The folder of committed results: of the clone that this package is in, or that the working directory is in.

    Raises:
        FileNotFoundError: neither has one.
    """
    for folder in (ROOT, Path.cwd(), *Path.cwd().parents):
        if (folder / RESULTS).is_dir():
            return folder / RESULTS
    raise FileNotFoundError(f"no folder {RESULTS} in {ROOT} or above {Path.cwd()}; accepted: a clone of the repository")
