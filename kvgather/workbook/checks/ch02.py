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
    codes = torch.arange(256, dtype=torch.uint8)
    argument = codes.clone()
    got = answer(argument, 0.5)
    if not isinstance(got, tuple) or len(got) != 2:
        raise Wrong("return two values: the codes and their scale")
    converted, scale = got
    if not isinstance(converted, Tensor) or converted.dtype != torch.uint8 or converted.shape != codes.shape:
        raise Wrong("the converted codes must be a uint8 tensor shaped like the given ones")
    expected = decode_table(torch.float8_e4m3fn) * 0.5
    values = converted.view(torch.float8_e4m3fnuz).float() * scale
    for code, (left, right) in enumerate(zip(expected.tolist(), values.tolist(), strict=True)):
        expect(left, right, f"the value of 0x{code:02x}, which became 0x{int(converted[code]):02x}")
    expect(codes, argument, "the argument, which must not change")


@exercise("02.3", correct="the largest magnitude of each head becomes the largest number of the format")
def head_scales(answer: Callable[[Tensor, float], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for heads, dim in ((4, 16), (3, 3)):
        k = torch.randn(20, heads, dim, generator=generator) * torch.tensor([1.0, 30.0, 0.01, 5.0])[:heads, None]
        k[7, 1, 2] = -200.0  # the largest magnitude of head 1 is negative
        for fmt in FORMATS.values():
            expected = torch.stack([k[:, head].abs().max() / fmt.max for head in range(heads)])
            name = f"K {list(k.shape)}, limit {fmt.max:g}"
            expect(expected, answer(k.clone(), fmt.max), name, tolerance=1e-6)


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
