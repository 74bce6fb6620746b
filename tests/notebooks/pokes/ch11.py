"""Chapter 11: the bug that its first cell takes as an example; otherwise the reader changes kernels, not constants."""

from tests.notebooks.pokes import Source

POKES = {"bug": (Source('hunt.BUGS["decode"]'), Source('hunt.BUGS["write"]'))}
