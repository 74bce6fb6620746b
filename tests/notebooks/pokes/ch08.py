"""Chapter 08: every constant of its first cell."""

from tests.notebooks.pokes import Refused

POKES = {
    "SYSTEM": ("Answer in one word . No titles please .", Refused("one two " * 30, "accepted: 19 or more")),
    "PROMPTS": (
        {"A": "a b c d e f g", "B": "a b c d e f h i j k l m n"},
        {"A": "a b c d e f g h i j k l", "B": "a b c d e"},
        Refused({"A": "a b c d e f g", "B": "h b c d e f g"}, "accepted: at most 0, the common tokens"),
    ),
    "PAGE": (2, 16, Refused(17, "accepted: at most 16, the common tokens")),
    "PAGE, BLOCKS": ((1, 40), (8, 16)),
    "BLOCKS": (24, 33, Refused(7, "accepted: 8 or more")),
    "Q_HEADS, KV_HEADS": ((4, 4), (6, 1), (2, 1), (16, 4), Refused((6, 4), "accepted")),
    "DIM": (32, 24, 8),
    "WINDOW": (1, 40, Refused(0, "accepted")),
    "SINK": (2, 6.0, -3.0, 0.0),
    "LENGTHS": ({"no cache": (3, 3), "prefix": (2, 9), "decode": (1, 30)}, {"no cache": (9, 9), "decode": (1, 1)}),
    "SEQUENCES, CACHED, SUFFIX": ((3, 100, 7), (1, 0, 5), (2, 4096, 1)),
    "WINDOWS": ((None, 4096, 64), (1,)),
}
