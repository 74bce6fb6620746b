"""Chapter 08b: the sequence, the workspaces, the pieces and the sinks."""

from tests.notebooks.pokes import Refused

POKES = {
    "PAGE": (16, 1),
    "Q_HEADS, KV_HEADS": ((6, 1), (4, 4), (16, 4), Refused((6, 4), "accepted")),
    "DIM": (32, 8),
    "NEW, TOTAL": ((1, 40), (12, 12), (3, 70), (2, 5), Refused((8, 7), "accepted")),
    "SINK": (0.0, 5.0, -2.0),
    "WORKSPACES": ((1, 2), (64, 23, 22), Refused((0,), "accepted")),
    "CUT": (1, 22),
    "PIECES": ((1, 3, 23), (2, 5)),
    "CONTEXT": (100, 1024, Refused(4, "accepted")),
    "LOGITS": ((8.0, 6.0), (4.0,)),
    "COUNTS": ((1, 3, 5, 64), (1, 2)),
    "WINDOW": (1, 100, Refused(0, "accepted")),
    "GROUP, HEAD_DIM, CACHED": ((4, 128, 8192), (8, 256, 1024), (1, 64, 131072)),
}
FIXED = {"OTHERS": "the implementations that the results name"}
