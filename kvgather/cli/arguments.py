"""What the arguments of several commands share."""

from __future__ import annotations

import argparse
from typing import Any

Commands = Any  # the return type of add_subparsers has no public name
STDOUT = "-"
"""The name of a file that stands for the standard output."""


def seconds(text: str) -> float:
    """The type of an argument that is a time.

    Raises:
        argparse.ArgumentTypeError: the text is not a number above 0, or is longer than `MAX_SECONDS`.
    """
    from ..lab.child import MAX_SECONDS

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is not a time; accepted: seconds above 0, at most {MAX_SECONDS:,.0f}")
    return value
