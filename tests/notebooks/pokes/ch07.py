"""Chapter 07: the batch that is traced; other numbers are those of the measured rows, and nothing is random."""

from tests.notebooks.pokes import Refused

POKES: dict[str, tuple[object, ...]] = {
    "LENGTHS": ((3,), (20, 5), Refused((0, 5), "accepted: a first sequence of one token or more")),
}
FIXED = {
    "H100": "the target of the compiled kernels",
    "AMD": "the targets of the compiled kernels",
}
