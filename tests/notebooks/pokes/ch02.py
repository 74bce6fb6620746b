"""Chapter 02: the sizes of the made K and V, and their loud channels and heads."""

POKES = {
    "TOKENS": (256, 1024),
    "HEADS": (8, 12),
    "DIM": (128, 64),
    "PAGE": (32, 8),
    "OUTLIERS": ([3, 30], [7, 8, 9, 60]),
    "LOUD, QUIET": ((1, 5), (7, 0)),
}
FIXED = {"KINDS": "the kinds of scales, each of which is one line of a table"}
