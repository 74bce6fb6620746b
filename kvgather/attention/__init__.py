"""Attention over a cached prefix: gathered for a dense kernel, or directly from the pages."""

from ..batch.capture import CaptureError
from .batch import PrefixBatch
from .merge import merge_states
from .prefix import prefix_attention

__all__ = ["CaptureError", "PrefixBatch", "merge_states", "prefix_attention"]
