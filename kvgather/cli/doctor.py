"""`kvgather doctor`: what this machine can run."""

from __future__ import annotations

import argparse

from .arguments import Commands
from .status import OK


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="print what this machine can run")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print what this machine can run."""
    from ..device import doctor as report

    print(report())
    return OK
