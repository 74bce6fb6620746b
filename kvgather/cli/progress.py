"""`kvgather progress`: the exercises that the reader has solved."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .arguments import STDOUT, Commands
from .status import FAILED, OK


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "progress",
        help="print which exercises of the workbook you have solved",
        description="A check that says `correct` in my-notebooks, the copy of the chapters that `make lab` opens, "
        "marks its exercise as solved.",
        epilog="exit status: 0 also if nothing is solved yet; 2 wrong usage, or no clone with the chapters; 3 the "
        "record is damaged or cannot be read",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE; - is the standard output alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print how many exercises of each chapter are solved in the reader's copy of the notebooks."""
    from ..files import check_replaceable, replace_text
    from ..workbook import launch
    from ..workbook import progress as record

    root = launch.find_root()
    if arguments.json not in (None, STDOUT):
        check_replaceable(Path(arguments.json))
    folder = root / launch.COPIES
    try:
        rows = record.overview(root, record.solved(folder))
    except record.ProgressError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return FAILED
    if arguments.json == STDOUT:
        print(record.as_json(rows), end="")
        return OK
    if arguments.json is not None:
        replace_text(Path(arguments.json), record.as_json(rows))
    print(record.report(rows))
    if not folder.is_dir():
        print(f"There is no {launch.COPIES} folder yet: `make lab` makes it and opens the first chapter.")
    return OK
