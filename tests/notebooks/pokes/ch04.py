"""Chapter 04: the sizes of the copy, those of the pool, and the program that is drawn."""

POKES = {
    "N": (13, 4),
    "LANES": (8, 2),
    "PAGE": (8, 32),
    "HEADS": (1, 4),
    "DIM": (64, 16),
    "BLOCKS": (8, 5),
    "PROGRAM": ((0, 0), (20, 1)),
}
