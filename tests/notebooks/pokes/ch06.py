"""Chapter 06: the sizes of the pool."""

from tests.notebooks.pokes import Refused

POKES = {
    "BLOCKS": (8, 12, Refused(4, "accepted: 5 or more")),
    "PAGE": (32, 48, Refused(8, "accepted in SHUFFLE")),
    "HEADS": (4, 3),
    "DIM": (32, 64),
    "TOKENS": (3, 1),
}
FIXED = {
    "SCALES": "the first of the scale kinds, to which the cell adds the others",
    "NAMES": "the cases of `kvgather crash` that a cell runs",
}
