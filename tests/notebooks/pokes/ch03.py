"""Chapter 03: the sizes of the pool, and the element that is looked up."""

from tests.notebooks.pokes import Refused

POKES = {
    "BLOCKS": (2, 5),
    "PAGE": (32, 48),
    "HEADS": (4, 1, 8),
    "DIM": (64, 48, 16, Refused(20, "accepted")),
    "ELEMENT": (
        {"block": 0, "head": 0, "page_offset": 0, "dim": 0},
        {"block": 2, "head": 1, "page_offset": 15, "dim": 31},
    ),
}
FIXED = {"LAYOUTS": "the three layouts of the package"}
