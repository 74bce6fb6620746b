"""Chapter 05: the pool, the batch, and the cache whose scale is read."""

POKES = {
    "PAGE": (32, 64, 8),
    "DIM": (32, 8),
    "BLOCKS": (8, 5),
    "SCALE": (0.25, 2.0),
    "BATCH": (
        {"heads": 2, "lengths": [5, 3], "block_table": [[4, 1], [2, 0]]},
        {"heads": 4, "lengths": [16, 8], "block_table": [[3, 0], [5, 1]]},
    ),
    "HEADS, PAGE_SIZE": ((4, 32), (1, 16)),
}
