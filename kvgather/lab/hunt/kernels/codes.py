"""FP8 codes decoded to FP32, on cards whose pools hold E4M3FNUZ."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def codes_kernel(out_ptr, codes_ptr, scale_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    code = tl.load(codes_ptr + i, mask=inside, other=0).to(tl.int32)
    sign = tl.where(code >= 128, -1.0, 1.0)
    exponent, mantissa = (code >> 3) & 15, (code & 7).to(tl.float32) / 8
    normal = (1 + mantissa) * tl.exp2(exponent.to(tl.float32) - 7)
    small = mantissa / 64
    value = sign * tl.where(exponent == 0, small, normal)
    value = tl.where((code & 127) == 127, float("nan"), value)
    tl.store(out_ptr + i, value * tl.load(scale_ptr), mask=inside)


def decode_codes(out: Tensor, codes: Tensor, scale: Tensor, kernel: Any = codes_kernel) -> None:
    """Fill `out` [n], FP32, with the values of `codes` [n] times `scale` [1].

    `codes` are the bytes of E4M3FNUZ, as uint8. (The other vendor's cards have another build, and E4M3FN.)
    """
    n = len(codes)
    kernel[(triton.cdiv(n, 32),)](out, codes, scale, n, BLOCK=32)


def oracle(out: Tensor, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The values by torch's own conversion."""
    return {"out": codes.view(torch.float8_e4m3fnuz).float() * scale}


def inputs(codes: str, scale: float = 0.5) -> dict[str, Any]:
    """Codes of the kind "zeros", "small" (numbers of a normal distribution) or "all" (0 to 255)."""
    numbers = torch.randn(64, generator=torch.Generator().manual_seed(9))
    kinds = {
        "zeros": torch.zeros(64, dtype=torch.uint8),
        "small": numbers.to(torch.float8_e4m3fnuz).view(torch.uint8),
        "all": torch.arange(256).to(torch.uint8),
        "part": torch.arange(100, 141).to(torch.uint8),
    }
    found = kinds[codes]
    return {"out": torch.full((len(found),), 7.0), "codes": found, "scale": torch.tensor([scale])}
