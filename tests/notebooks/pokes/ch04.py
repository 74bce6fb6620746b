"""Chapter 04: the sizes of the copy, those of the pool, and the program that is drawn."""

from tests.notebooks.pokes import Refused

POKES = {
    "N": (13, 4),
    "LANES": (8, 2),
    "PAGE": (32, 48, Refused(8, "accepted in SHUFFLE with 1-byte elements: multiples of 16")),
    "HEADS": (4, 3, Refused(1, "which loads nothing")),
    "DIM": (64, 16),
    "BLOCKS": (8, 5),
    "PROGRAM": ((0, 0), (20, 1)),
}
