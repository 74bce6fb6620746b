"""Chapter 07: its numbers are those of the measured rows and of the compiled kernels, and nothing is random."""

POKES: dict[str, tuple[object, ...]] = {}
FIXED = {
    "HEADS": "of the measured rows",
    "PAGE": "of the measured rows",
    "DIM": "of the measured rows",
    "H100": "the target of the compiled kernels",
    "AMD": "the targets of the compiled kernels",
}
