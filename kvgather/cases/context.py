"""The batches that `kvgather bench parallel` times: one sequence with a long cached context, its pages on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

CONTEXTS = (262_144, 1_048_576, 4_194_304)
"""Cached tokens."""
NEW = (1, 16, 512)
"""New tokens; 1 is decode."""


@dataclass(frozen=True)
class ContextCase:
    """One layer and one sequence; NHD, FP8 e4m3fn with a scale per tensor, rows in BF16.

    Attributes:
        context: cached tokens.
        new: new tokens.
    """

    context: int
    new: int

    Q_HEADS: ClassVar[int] = 64
    KV_HEADS: ClassVar[int] = 8
    HEAD_DIM: ClassVar[int] = 64
    PAGE: ClassVar[int] = 16

    @property
    def name(self) -> str:
        """Such as `64q8x64-NHD-per-tensor-1seqs-262144+16`."""
        heads = f"{self.Q_HEADS}q{self.KV_HEADS}x{self.HEAD_DIM}"
        return f"{heads}-NHD-per-tensor-1seqs-{self.context}+{self.new}"

    @property
    def tokens(self) -> int:
        """Cached and new tokens."""
        return self.context + self.new

    @classmethod
    def token_bytes(cls) -> int:
        """Bytes of a token's codes, K and V."""
        return cls.KV_HEADS * 2 * cls.HEAD_DIM
