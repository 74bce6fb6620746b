"""Chapter 06: the sizes of the pool."""

POKES = {
    "BLOCKS": (8, 4),
    "PAGE": (32, 8),
    "HEADS": (4, 3),
    "DIM": (32, 64),
    "TOKENS": (3, 1),
}
FIXED = {
    "SCALES": "the first of the scale kinds, to which the cell adds the others",
    "NAMES": "the cases of `kvgather crash` that a cell runs",
}
