"""The one table of cases for tests, benchmarks and the lab: layouts × scale kinds × dtypes × shapes.

A case is a description; its tensors are built from a seed, the same on every machine.

    case        `Case`: one cache and one batch to gather from it
    tensors     `build`: the tensors of a `Case`
    small       the gathers that tests compare with the reference
    measured    the gathers that benchmarks time
    attention   `AttentionCase`: one layer and one batch of the prefix path; the grid of the GPU tests
    prefix      `PrefixCase`: the batches that `kvgather bench prefix` times, and their tensors
"""

from .attention import GRID, HEADS, MODELS, PAGES, SINKS, WINDOWS, AttentionCase, Heads, sinks_of
from .case import POOL_STYLES, Case, fits
from .small import SHAPES, SMALL
from .tensors import Built, build, empty_pools

__all__ = [
    "GRID",
    "HEADS",
    "MODELS",
    "PAGES",
    "POOL_STYLES",
    "SHAPES",
    "SINKS",
    "SMALL",
    "WINDOWS",
    "AttentionCase",
    "Built",
    "Case",
    "Heads",
    "build",
    "empty_pools",
    "fits",
    "sinks_of",
]
