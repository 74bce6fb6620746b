"""Several GPUs: a context, or heads, distributed over the ranks of a `torch.distributed` group."""

from ..batch.share import Share
from .context import ContextParallel
from .heads import heads_of, scale_of_heads
from .ranks import RankError

__all__ = ["ContextParallel", "RankError", "Share", "heads_of", "scale_of_heads"]
