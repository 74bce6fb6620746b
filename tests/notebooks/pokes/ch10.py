"""Chapter 10: the model, the ranks of both ways, the sequences, and the lost rank.

Constants of one part of the chapter change together: each run starts child processes, and takes half a minute.
"""

from tests.notebooks.pokes import Refused

POKES = {
    "LAYERS, KV_HEADS, HEAD_DIM, ITEMSIZE, GPU_GIB, CONTEXTS, RANK_COUNTS": (
        (36, 8, 64, 2, 141, (100, 10_000_000), (1, 3, 6)),
        (61, 1, 576, 2, 24, (32_768,), (2,)),
    ),
    "HEAD_RANKS, QUERY_HEADS, ALL_HEADS, BLOCKS, PAGE, DIM": (
        (4, 64, 8, 3, 16, 32),
        (8, 8, 8, 2, 1, 8),
        (3, 24, 6, 6, 4, 16),
        Refused((3, 64, 8, 6, 4, 16), "accepted"),
        Refused((1, 64, 8, 6, 4, 16), "accepted"),
        Refused((2, 64, 8, 1, 4, 16), "accepted"),
    ),
    "RANKS, PAGE_SIZE, CACHED, NEW": (
        (3, 16, (5, 0, 120), (2, 3, 1)),
        (4, 1, (8,), (4,)),
        (2, 4, (8, 70), (16, 1)),
        Refused((1, 4, (8,), (4,)), "accepted"),
        Refused((9, 4, (8,), (4,)), "accepted"),
        Refused((2, 4, (8,), (0,)), "accepted"),
    ),
    "Q_HEADS, K_HEADS, K_DIM, SINK, SINK_RANKS": (
        (4, 4, 32, 0.0, (1, 3)),
        (6, 1, 8, 4.0, (2, 16)),
        (8, 2, 16, -3.0, (1, 2)),
        Refused((6, 4, 8, 1.0, (1, 2)), "accepted"),
    ),
    "CHUNK, GPT_Q, GPT_KV, GPT_DIM, FAR": ((3, 32, 8, 128, 4096), (64, 128, 1, 512, 10_000_000)),
    "LOST, SECONDS": ((0, 3), (1, 5), Refused((2, 2), "accepted"), Refused((-1, 2), "accepted")),
}
