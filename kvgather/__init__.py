"""Gather K and V out of a paged FP8 cache: right on every layout and scale kind, never out of bounds."""

from . import device  # isort: skip  (before anything imports triton)
from .attention import CaptureError, PrefixBatch, merge_states, prefix_attention
from .blocks import BlockPool, OutOfBlocksError, cu_seqlens
from .cache import PagedKVCache
from .device import BackendError
from .gather import cp_mha_gather_cache, gather
from .plan import GatherPlan, PlanError
from .scatter import SlotError

__all__ = [
    "BackendError",
    "BlockPool",
    "CaptureError",
    "GatherPlan",
    "OutOfBlocksError",
    "PagedKVCache",
    "PlanError",
    "PrefixBatch",
    "SlotError",
    "cp_mha_gather_cache",
    "cu_seqlens",
    "device",
    "gather",
    "merge_states",
    "prefix_attention",
]
