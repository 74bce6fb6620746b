"""Chapter 01: the requests, the memory and the page size of the experiment."""

POKES = {
    "MEMORY": (4096, 16384),
    "LONGEST": (1200, 2000),
    "PAGE": (1, 2, 4, 8, 12, 32, 64),
    "REQUESTS": (200, 5),
    "SPARE": (0, 256),
    "LAYERS, HEADS, DIM, BYTES": ((80, 8, 128, 2), (36, 8, 64, 1)),
}
FIXED = {"HEADERS": "the headers of a table"}
