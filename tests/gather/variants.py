"""The kernel variants that are compiled ahead of time, each for every target: the fewest that hold each constant."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvgather.cases import Case
from kvgather.formats.fp8 import FLOATS
from kvgather.formats.layout import LAYOUTS
from kvgather.lab.assembly import Variant

FN, FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
BF16, FP16, FP32 = FLOATS

# 2^19 blocks make a pool of 4 GiB and more: then Triton addresses it through 64-bit pointers on AMD GPUs too.
ENGINE = Case(num_heads=8, k_dim=64, v_dim=64, lengths=(145_652,), starts=(), num_blocks=2**19)
SMALL = replace(ENGINE, num_blocks=512, lengths=(1500,))


def case(base: Case = SMALL, *, kinds: str = "per-tensor", dims: tuple[int, int] = (64, 64), **changes: object) -> Case:
    k_kind, _, v_kind = kinds.partition(":")
    k_dim, v_dim = dims
    both = {"k_kind": k_kind, "v_kind": v_kind or k_kind, "k_dim": k_dim, "v_dim": v_dim}
    return replace(base, **both, **changes)  # type: ignore[arg-type]


MAIN = tuple(
    Variant(case(ENGINE, layout=layout, kinds=kinds, dims=(dim, dim)))
    for layout in LAYOUTS
    for kinds in ("per-tensor", "per-token-head")
    for dim in (64, 128)
)
"""What engines run."""

FLOAT_POOLS = (
    Variant(case(dtype=BF16, kinds="none")),
    Variant(case(dtype=FP16, layout="SHUFFLE", page_size=8, num_heads=4, kinds="none:per-token-head", out_dtype=FP16)),
    Variant(case(dtype=FP32, layout="SHUFFLE", kinds="per-head")),
)

OTHERS = (
    # pages and head dims of every kind, and a copy of codes as they are
    Variant(case(page_size=1, num_heads=1, dims=(1, 2), kinds="per-head:none")),
    Variant(case(page_size=2, num_heads=2, dims=(8, 4), kinds="none", out_dtype=FN, layout="HND")),
    Variant(
        case(page_size=3, num_heads=7, dims=(20, 24), kinds="per-token-head", out_dtype=FP32, pool_style="stepped")
    ),
    Variant(case(page_size=24, num_heads=5, dims=(80, 96), dtype=FNUZ, pool_style="packed")),
    Variant(case(num_heads=4, dims=(192, 128), kinds="per-token-head:per-head", layout="SHUFFLE", pool_style="padded")),
    # strides past 2^31
    Variant(case(ENGINE, dtype=E5M2, layout="SHUFFLE", out_dtype=FP16, num_blocks=2**22), heads_outermost=True),
)

BY_TABLE = (
    Variant(case(ENGINE, layout="SHUFFLE", kinds="per-token-head"), by_table=True),
    Variant(case(kinds="per-tensor", dims=(128, 128), lengths=(40,) * 40, starts=(3,) * 40), by_table=True),
)
"""The engines' call, which finds its pages itself: few sequences and many, with starts and without."""

FOR_ATTENTION = (
    Variant(case(ENGINE, layout="SHUFFLE", kinds="per-token-head"), for_attention=True),
    Variant(case(dtype=BF16, kinds="none", layout="HND"), for_attention=True),
)
"""What attention gathers: V decoded, and V copied as it is."""

VARIANTS = (*MAIN, *FLOAT_POOLS, *OTHERS, *BY_TABLE, *FOR_ATTENTION)

REFUSED = {"hip:gfx1250": ((3, 7), r"LLD failed to link")}
"""Targets that Triton refuses before a version, and in what words: 3.6 makes assembly that its own linker refuses."""
