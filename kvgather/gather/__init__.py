"""The gather: a plain-torch reference, a page-tiled Triton kernel, and the call that engines make."""

from .compat import cp_mha_gather_cache
from .dispatch import gather

__all__ = ["cp_mha_gather_cache", "gather"]
