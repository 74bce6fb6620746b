"""One cache and one batch to gather from it, as a description."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.checks import dtype_name
from ..formats.layout import group

POOL_STYLES = ("contiguous", "sliced", "padded", "packed", "permuted", "stepped")
"""The memory of a pool: contiguous; some heads of a larger pool; blocks with gaps between them; K and V of a block next
to each other in one allocation; the axes in another order (HND in NHD's memory, NHD in HND's); every second element."""


@dataclass(frozen=True)
class Case:
    """One cache and one batch to gather from it.

    Attributes:
        layout, dtype, k_kind, v_kind: layout, pool dtype and scale kinds of the cache.
        out_dtype: dtype of the gathered rows.
        page_size, num_heads, k_dim, v_dim: the geometry of the cache.
        lengths: tokens to gather for each sequence.
        starts: position at which the gather of each sequence begins; empty means 0 for all.
        spare_rows: rows of the output beyond the batch's tokens.
        num_blocks: blocks of the pool; 0 means three more than the batch needs.
        pool_style: one of `POOL_STYLES`.
        index_dtype: dtype of the block table, the offsets and the starts.
    """

    layout: str = "NHD"
    dtype: torch.dtype = torch.float8_e4m3fn
    k_kind: str = "per-tensor"
    v_kind: str = "per-tensor"
    out_dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    num_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    lengths: tuple[int, ...] = (19,)
    starts: tuple[int, ...] = (3,)
    spare_rows: int = 0
    num_blocks: int = 0
    pool_style: str = "contiguous"
    index_dtype: torch.dtype = torch.int32

    @property
    def name(self) -> str:
        """A unique name without spaces, for shells and CSV files: `SHUFFLE-8x64-page16-e4m3fn>bfloat16-…`."""
        dims = f"{self.k_dim}" if self.k_dim == self.v_dim else f"{self.k_dim}:{self.v_dim}"
        kinds = self.k_kind if self.k_kind == self.v_kind else f"{self.k_kind}:{self.v_kind}"
        parts = [
            self.layout,
            f"{self.num_heads}x{dims}",
            f"page{self.page_size}",
            f"{dtype_name(self.dtype).removeprefix('float8_')}>{dtype_name(self.out_dtype).removeprefix('float8_')}",
            kinds,
            f"{len(self.lengths)}seqs{sum(self.lengths)}",
        ]
        parts += ["chunk"] if any(self.starts) else []
        parts += [f"spare{self.spare_rows}"] if self.spare_rows else []
        parts += [self.pool_style] if self.pool_style != "contiguous" else []
        parts += ["int64"] if self.index_dtype == torch.int64 else []
        return "-".join(parts)

    @property
    def pages(self) -> tuple[int, ...]:
        """Blocks of each sequence up to its last gathered token, those before its start included."""
        starts = self.starts or (0,) * len(self.lengths)
        return tuple(
            -(-(start + length) // self.page_size) if length else 0
            for start, length in zip(starts, self.lengths, strict=True)
        )

    @property
    def total_tokens(self) -> int:
        """Rows of the output, the spare ones included."""
        return sum(self.lengths) + self.spare_rows

    @property
    def fits(self) -> bool:
        """Whether the layout can represent the geometry."""
        return fits(self.layout, self.page_size, self.k_dim, self.dtype)


def fits(layout: str, page_size: int, k_dim: int, dtype: torch.dtype) -> bool:
    """Whether a layout can represent a geometry: SHUFFLE's groups of 16 bytes must divide K's dims and the page."""
    x = group(dtype.itemsize)
    return layout != "SHUFFLE" or (k_dim % x == 0 and page_size % x == 0)
