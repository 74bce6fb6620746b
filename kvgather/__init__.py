"""Gather K and V out of a paged FP8 cache: right on every layout and scale kind, never out of bounds."""

from . import device  # isort: skip  (before anything imports triton)
from .attention import CaptureError, PrefixBatch, merge_states, prefix_attention
from .blocks import BlockPool
from .cache import PagedKVCache
from .gather import cp_mha_gather_cache, gather
from .plan import GatherPlan, PlanError

__all__ = [
    "BlockPool",
    "CaptureError",
    "GatherPlan",
    "PagedKVCache",
    "PlanError",
    "PrefixBatch",
    "cp_mha_gather_cache",
    "device",
    "gather",
    "merge_states",
    "prefix_attention",
]
