"""Checks of chapter 02: codes, flavours and scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgather.formats.fp8 import E4M3FN, FORMATS, Fp8Format, decode_table, quantize
from kvgather.workbook.checks import Wrong, exercise, expect


@exercise("02.1", correct="all 256 codes, including subnormals and both NaNs")
def decode_code(answer: Callable[[int], float]) -> None:
    for code, value in enumerate(decode_table(torch.float8_e4m3fn).tolist()):
        expect(value, answer(code), f"code 0x{code:02x}")


@exercise(
    "02.2",
    correct="−0 became 0, both NaNs became e4m3fnuz's NaN; other codes have half the value, at twice the scale",
)
def to_fnuz(answer: Callable[[Tensor, float], tuple[Tensor, float]]) -> None:
    every_code = torch.arange(256, dtype=torch.uint8)
    # In the second case a code is not its index, and twice the scale is not 1.
    for codes, given in ((every_code, 0.5), (every_code.flip(0).repeat(2).view(16, 32), 0.3)):
        argument = codes.clone()
        got = answer(argument, given)
        if not isinstance(got, tuple) or len(got) != 2:
            raise Wrong("return two values: the codes and their scale")
        converted, scale = got
        if not isinstance(converted, Tensor) or converted.dtype != torch.uint8 or converted.shape != codes.shape:
            raise Wrong("the converted codes must be a uint8 tensor shaped like the given ones")
        expected = codes.view(torch.float8_e4m3fn).float() * given
        values = converted.view(torch.float8_e4m3fnuz).float() * scale
        parts = (part.flatten().tolist() for part in (codes, converted, expected, values))
        for code, became, left, right in zip(*parts, strict=True):
            expect(left, right, f"scale {given}: the value of 0x{code:02x}, which became 0x{became:02x}")
        expect(codes, argument, "the argument, which must not change")


@exercise("02.3", correct="the largest magnitude of each head becomes the largest number of the format")
def head_scales(answer: Callable[[Tensor, float], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for dtype, heads, dim in ((torch.float32, 4, 16), (torch.float32, 3, 3), (torch.bfloat16, 4, 16)):
        k = torch.randn(20, heads, dim, generator=generator) * torch.tensor([1.0, 30.0, 0.01, 5.0])[:heads, None]
        k[7, 1, 2] = -200.0  # the largest magnitude of head 1 is negative
        k = k.to(dtype)
        for fmt in FORMATS.values():
            expected = torch.stack([k[:, head].float().abs().max() / fmt.max for head in range(heads)])
            got = answer(k.clone(), fmt.max)
            name = f"K {list(k.shape)} in {str(dtype).removeprefix('torch.')}, limit {fmt.max:g}"
            expect(expected, got, name, tolerance=1e-6)
            # This tolerance is absolute below 1, and most scales are far below 1.
            expect(torch.ones(heads), got / expected, f"{name}, scales divided by the right ones", tolerance=1e-6)


@exercise("02.4", correct="divided along the heads, clamped, cast")
def store(answer: Callable[[Tensor, Tensor, Fp8Format], Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    # The first case has as many heads as dims: dividing along the wrong axis runs, with a wrong result.
    for tokens, heads, dim in ((5, 4, 4), (3, 2, 8)):
        scales = torch.tensor([0.25, 2.0, 0.01, 1.0])[:heads]
        x = torch.randn(tokens, heads, dim, generator=generator) * scales[:, None] * 20
        for fmt in (E4M3FN, *(f for f in FORMATS.values() if f is not E4M3FN)):
            x[1, 0, 1], x[2, 1, 0] = 2 * fmt.max * scales[0], -3 * fmt.max * scales[1]
            expected = quantize(x, scales[:, None], fmt.dtype)
            got = answer(x.clone(), scales.clone(), fmt)
            expect(expected, got, f"x {list(x.shape)} in {fmt.name}")
