"""Chapter 03: the sizes of the pool, and the element that is looked up."""

from tests.notebooks.pokes import Refused

POKES = {
    "BLOCKS": (2, 5),
    "PAGE": (32, 48),
    "HEADS": (4, Refused(1, "ELEMENT has head 1; accepted: 0 to 0"), 8),
    "DIM": (64, 48, Refused(16, "ELEMENT has dim 20; accepted"), Refused(20, "accepted")),
    "ELEMENT": (
        {"block": 0, "head": 0, "page_offset": 0, "dim": 0},
        {"block": 2, "head": 1, "page_offset": 15, "dim": 31},
    ),
}
FIXED = {"LAYOUTS": "the three layouts of the package"}
