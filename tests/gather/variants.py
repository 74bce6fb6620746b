"""The kernel variants that are compiled ahead of time, and for which GPUs each."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvgather.bench.cases import Case
from kvgather.formats.fp8 import FLOATS
from kvgather.formats.layout import LAYOUTS
from kvgather.lab.assembly import TARGETS, Variant

FN, FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
BF16, FP16, FP32 = FLOATS
AMPERE, ADA, HOPPER, BLACKWELL, RTX50, CDNA2, CDNA3, CDNA4, RDNA3, RDNA4, GFX1250 = TARGETS

# 2^19 blocks make a pool of 4 GiB and more: then Triton addresses it through 64-bit pointers on AMD GPUs too.
ENGINE = Case(num_heads=8, k_dim=64, v_dim=64, lengths=(145_652,), starts=(), num_blocks=2**19)
SMALL = replace(ENGINE, num_blocks=512, lengths=(1500,))


def case(base: Case = SMALL, *, kinds: str = "per-tensor", dims: tuple[int, int] = (64, 64), **changes: object) -> Case:
    k_kind, _, v_kind = kinds.partition(":")
    k_dim, v_dim = dims
    both = {"k_kind": k_kind, "v_kind": v_kind or k_kind, "k_dim": k_dim, "v_dim": v_dim}
    return replace(base, **both, **changes)  # type: ignore[arg-type]


def raw(dtype: torch.dtype, layout: str, **changes: object) -> Case:
    return case(kinds="none", dtype=dtype, out_dtype=dtype, layout=layout, **changes)


MAIN: dict[Variant, tuple[str, ...]] = {
    Variant(case(ENGINE, layout=layout, kinds=kind, dims=(dim, dim))): targets
    for layout in LAYOUTS
    for kind, dim, targets in (
        ("per-tensor", 64, TARGETS),
        ("per-token-head", 128, (AMPERE, HOPPER, BLACKWELL, CDNA3, CDNA4, RDNA3, RDNA4)),
        ("per-token-head", 64, (HOPPER, CDNA3)),
        ("per-tensor", 128, (HOPPER, CDNA3)),
    )
}
"""What engines run. In HND and NHD it is one kernel, told apart by its strides alone, and is compiled once."""

FLOAT_POOLS: dict[Variant, tuple[str, ...]] = {
    Variant(raw(BF16, "NHD")): (HOPPER,),
    Variant(raw(FP16, "HND")): (RDNA3,),
    Variant(raw(FP32, "SHUFFLE")): (BLACKWELL,),
    Variant(raw(BF16, "SHUFFLE")): (HOPPER, RDNA4),
    Variant(case(dtype=BF16, layout="SHUFFLE", kinds="none:per-token-head")): (RTX50,),
    Variant(case(dtype=FP16, layout="NHD")): (AMPERE,),
    Variant(case(dtype=FP32, layout="HND", kinds="per-head", out_dtype=FP16)): (GFX1250,),
}

OTHERS: dict[Variant, tuple[str, ...]] = {
    # every FP8 format, decoded by the hardware and in software
    Variant(case(dtype=FNUZ, kinds="per-head")): (CDNA3,),
    Variant(case(dtype=E5M2, layout="HND", kinds="per-page-head", out_dtype=FP16)): (ADA, CDNA3),
    Variant(case(dtype=FNUZ, layout="SHUFFLE", kinds="per-page-head:none", out_dtype=FP32)): (AMPERE,),
    Variant(case(layout="SHUFFLE", kinds="none", out_dtype=FP32)): (CDNA2,),
    # codes as they are
    Variant(raw(FN, "NHD")): (BLACKWELL,),
    Variant(raw(FNUZ, "HND")): (CDNA2,),
    Variant(raw(E5M2, "SHUFFLE", num_heads=2)): (RDNA4,),
    # head dims and pages of every kind
    Variant(case(layout="SHUFFLE", num_heads=4, dims=(192, 128))): (CDNA4,),
    Variant(case(layout="SHUFFLE", num_heads=1, kinds="per-token-head")): (HOPPER,),
    Variant(case(page_size=1, num_heads=1, dims=(1, 2), kinds="per-head")): (ADA,),
    Variant(case(page_size=2, num_heads=2, dims=(8, 4), kinds="per-token-head")): (RDNA3,),
    Variant(case(page_size=3, num_heads=7, dims=(20, 24), out_dtype=FP32)): (RTX50,),
    Variant(case(page_size=7, num_heads=3, dims=(40, 72), layout="HND")): (CDNA2,),
    Variant(case(page_size=24, num_heads=5, dims=(80, 96))): (GFX1250,),
    Variant(case(page_size=48, num_heads=9, dims=(16, 112), layout="SHUFFLE")): (RDNA4,),
    Variant(case(page_size=128, layout="SHUFFLE", dims=(256, 256), kinds="per-token-head:per-head")): (BLACKWELL,),
    # strides: past 2^31, and none that is 1
    Variant(case(ENGINE, kinds="per-token-head", num_blocks=2**21), heads_outermost=True): (CDNA4,),
    Variant(case(ENGINE, layout="SHUFFLE", num_blocks=2**22), heads_outermost=True): (ADA,),
    Variant(case(pool_style="stepped", kinds="per-token-head")): (AMPERE,),
    Variant(case(pool_style="padded", layout="SHUFFLE")): (CDNA3,),
    Variant(case(pool_style="packed", layout="HND", num_heads=16, dims=(32, 32))): (RDNA3,),
}

VARIANTS = MAIN | FLOAT_POOLS | OTHERS
