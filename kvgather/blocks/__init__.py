"""The pool's blocks: reference counts, prefix sharing by content, eviction."""

from .offsets import cu_seqlens
from .pool import BlockPool, OutOfBlocksError, PooledSequence

__all__ = ["BlockPool", "OutOfBlocksError", "PooledSequence", "cu_seqlens"]
