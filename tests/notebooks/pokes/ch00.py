"""Chapter 00: the layout and the scale of the picture, as its text says; and the pool's sizes."""

from tests.notebooks.pokes import Refused

POKES = {
    "LAYOUT": ("HND", "SHUFFLE", Refused("NDH", "accepted")),
    "SCALE": (2.0, 0.125, Refused(0.0, "accepted")),
    "SIZE": (48, 32),
    "PAGE, BLOCKS": ((16, 12), (8, 20)),
}
