"""Chapter 00: the layout and the scale of the picture, as its text says; and the pool's sizes."""

from tests.notebooks.pokes import Refused

POKES = {
    "LAYOUT": ("HND", "SHUFFLE", Refused("NDH", "accepted")),
    "SCALE": (2.0, 0.125, Refused(0.0, "accepted")),
    "SIZE": (Refused(48, "accepted: equal numbers"), Refused(256, "accepted: equal numbers")),
    "PAGE, SIZE": ((8, 64), (4, 32)),
    "BLOCKS": (20, Refused(8, "accepted")),
}
