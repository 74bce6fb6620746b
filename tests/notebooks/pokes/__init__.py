"""The constants of each chapter that a reader may change, with other values, for `tools/poke.py`.

`chNN.py` has `POKES`, from the name of a constant to two other values (names with commas between them change together),
and `FIXED`, from the name of a constant that the text does not invite to change to the reason. The first value is the
one that `make test` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """A value that the chapter refuses, and a part of what its error says."""

    value: Any
    said: str


class Source(str):
    """A value as Python source, such as `Source("torch.float8_e5m2")`."""
