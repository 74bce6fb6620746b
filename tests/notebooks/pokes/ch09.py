"""Chapter 09: the requests and the budget of a step."""

from tests.notebooks.pokes import Refused

POKES = {
    "REQUESTS, SHARED, OWN, NEW": (
        (9, 48, 20, 3),
        (20, 20, 12, 2),
        Refused((9, 8, 12, 3), "accepted"),
        Refused((9, 48, 20, 1), "12, 2 or more"),
    ),
    "BUDGET": (256, 4096),
}
FIXED = {"PAGE": "the replay's server has blocks of 16, and the numbers of both runs belong together"}
