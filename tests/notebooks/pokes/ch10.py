"""Chapter 10: the model, the ranks of both ways, the sequences, and the lost rank."""

from tests.notebooks.pokes import Refused

POKES = {
    "LAYERS, KV_HEADS, HEAD_DIM, ITEMSIZE": ((36, 8, 64, 2), (32, 2, 128, 1), (61, 1, 576, 2)),
    "GPU_GIB": (141, 24),
    "CONTEXTS": ((100, 10_000_000), (32_768,)),
    "RANK_COUNTS": ((1, 3, 6), (2,)),
    "HEAD_RANKS, QUERY_HEADS, ALL_HEADS": (
        (4, 64, 8), (2, 4, 4), (3, 24, 6), (8, 8, 8), Refused((3, 64, 8), "accepted"), Refused((1, 64, 8), "accepted"),
    ),
    "BLOCKS, PAGE, DIM": ((3, 16, 32), (2, 1, 8), Refused((1, 4, 16), "accepted")),
    "RANKS": (3, 4, Refused(1, "accepted"), Refused(9, "accepted")),
    "PAGE_SIZE": (16, 1),
    "CACHED, NEW": (((5, 0, 120), (2, 3, 1)), ((8,), (4,)), Refused(((8,), (0,)), "accepted")),
    "Q_HEADS, K_HEADS, K_DIM": ((4, 4, 32), (6, 1, 8), Refused((6, 4, 8), "accepted")),
    "SINK": (0.0, 4.0, -3.0),
    "SINK_RANKS": ((1, 3), (2, 16)),
    "CHUNK": (3, 64),
    "GPT_Q, GPT_KV, GPT_DIM": ((32, 8, 128), (128, 1, 512)),
    "FAR": (4096, 10_000_000),
    "LOST": (0, Refused(2, "accepted"), Refused(-1, "accepted")),
    "SECONDS": (2, 5),
}  # fmt: skip
