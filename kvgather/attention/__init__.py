"""Attention over a prefix that is cached: gathered and dense, or straight from the pages."""

from .batch import PrefixBatch
from .capture import CaptureError
from .merge import merge_states
from .prefix import prefix_attention

__all__ = ["CaptureError", "PrefixBatch", "merge_states", "prefix_attention"]
