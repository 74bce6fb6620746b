"""The Hopper kernel, one launch for each form, head dim, page size and scale, with bad blocks and spare rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hopper:
    """One launch. On other GPUs than Hopper's it is the direct kernel's.

    Attributes:
        tokens: new tokens of the longest sequence.
        heads: query heads, KV heads.
        kinds: of K's scale, of V's.
    """

    dim: int
    tokens: int
    heads: tuple[int, int]
    page_size: int = 16
    kinds: tuple[str, str] = ("per-tensor", "per-tensor")
    q_dtype: torch.dtype = torch.bfloat16
    sinks: bool = False

    def __str__(self) -> str:
        scales = ":".join(self.kinds)
        told = (
            f"{self.heads[0]}/{self.heads[1]}x{self.dim} page{self.page_size} {scales} {self.tokens} new {self.q_dtype}"
        )
        return f"{told} sinks" if self.sinks else told

    def run(self, device: str) -> None:
        """Attend, and compare with the formula on a CPU over what the pool holds."""
        from kvgather.attention.direct import direct_attention
        from kvgather.attention.reference import reference_attention
        from tests.attention.batches import assert_close
        from tests.attention.direct_cases import filled

        q_heads = self.heads[0]
        made = filled(
            [self.tokens, 1, 0, 5], [300, 37, 9, 0], self.kinds, heads=self.heads, dims=(self.dim, self.dim),
            page_size=self.page_size, dtype=torch.float8_e4m3fn, q_dtype=self.q_dtype, device=device, spare=2,
        )  # fmt: skip
        sinks = torch.linspace(-1, 1, q_heads) if self.sinks else None
        k, v = (rows.cpu() for rows in made.held())
        offsets = [offset.cpu() for offset in made.offsets]
        wanted = reference_attention(made.q.cpu(), k, v, *offsets, sinks=sinks)
        made.block_table[1, 0] = -1
        for hopper, max_q in ((True, self.tokens), (True, 5), (False, self.tokens)):
            out, lse = direct_attention(
                made.q, made.cache, made.batch(lengths=False, max_q=max_q), softmax_scale=self.dim**-0.5,
                sinks=None if sinks is None else sinks.to(device), hopper=hopper,
            )  # fmt: skip
            assert lse is not None
            got, bad = (out.cpu(), lse.cpu()), torch.zeros(len(out), dtype=torch.bool)
            bad[self.tokens] = True  # its sequence's first block is bad
            bad[: self.tokens] |= self.tokens > max_q
            assert got[0][bad].isnan().all() and got[1][bad].isnan().all()
            used = ~bad[: made.rows]
            assert_close(
                (got[0][: made.rows][used], got[1][: made.rows][used]),
                (wanted[0][: made.rows][used], wanted[1][: made.rows][used]),
            )
            assert got[0][made.rows :].eq(0).all()


HOPPER: tuple[Hopper, ...] = (
    Hopper(64, 8, (16, 2)),
    Hopper(64, 20, (3, 1), 48, ("none", "per-tensor"), torch.float16, True),
    Hopper(64, 16, (16, 2)),
    Hopper(64, 40, (16, 2), 48, ("none", "none"), torch.float16, True),
    Hopper(64, 50, (3, 1), 64, ("none", "per-tensor"), sinks=True),
    Hopper(128, 32, (8, 2)),
    Hopper(128, 12, (5, 1), 48, ("per-tensor", "none"), torch.float16, True),
    Hopper(128, 70, (8, 2)),
    Hopper(128, 33, (5, 1), 128, ("per-tensor", "none"), torch.float16, True),
)
