"""Attention over a prefix that is cached: gathered and dense, or straight from the pages."""

from .batch import PrefixBatch

__all__ = ["PrefixBatch"]
