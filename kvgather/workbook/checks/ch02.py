"""Checks of chapter 02: codes, flavours and scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgather.formats.fp8 import E4M3FN, FORMATS, Fp8Format, decode_table, quantize
from kvgather.workbook.checks import Wrong, exercise, expect


@exercise("02.1", correct="all 256 codes, the subnormal ones and both NaNs too")
def decode_code(answer: Callable[[int], float]) -> None:
    for code, value in enumerate(decode_table(torch.float8_e4m3fn).tolist()):
        expect(value, answer(code), f"code 0x{code:02x}")


@exercise(
    "02.2", correct="−0 became 0, both NaNs became the one that e4m3fnuz has, and everything else is its double half"
)
def to_fnuz(answer: Callable[[Tensor, float], tuple[Tensor, float]]) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    given = codes.clone()
    got = answer(given, 0.5)
    if not isinstance(got, tuple) or len(got) != 2:
        raise Wrong("return two things: the codes, and the scale that belongs to them")
    converted, scale = got
    if not isinstance(converted, Tensor) or converted.dtype != torch.uint8 or converted.shape != codes.shape:
        raise Wrong("the converted codes must be a uint8 tensor shaped like the given ones")
    wanted = decode_table(torch.float8_e4m3fn) * 0.5
    meaning = converted.view(torch.float8_e4m3fnuz).float() * scale
    for code, (left, right) in enumerate(zip(wanted.tolist(), meaning.tolist(), strict=True)):
        expect(left, right, f"the meaning of 0x{code:02x}, which became 0x{int(converted[code]):02x}")
    expect(codes, given, "the codes you were given")


@exercise("02.3", correct="the largest magnitude of each head lands on the largest number of the format")
def head_scales(answer: Callable[[Tensor, float], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for heads, dim in ((4, 16), (3, 3)):
        k = torch.randn(20, heads, dim, generator=generator) * torch.tensor([1.0, 30.0, 0.01, 5.0])[:heads, None]
        k[7, 1, 2] = -200.0  # the largest magnitude of head 1 is negative
        for fmt in FORMATS.values():
            expected = torch.stack([k[:, head].abs().max() / fmt.max for head in range(heads)])
            what = f"K {list(k.shape)}, limit {fmt.max:g}"
            expect(expected, answer(k.clone(), fmt.max), what, tolerance=1e-6)


@exercise("02.4", correct="divided along the heads, clamped, cast")
def store(answer: Callable[[Tensor, Tensor, Fp8Format], Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    # As many heads as dims in the first case: dividing along the wrong axis runs there, and is wrong.
    for tokens, heads, dim in ((5, 4, 4), (3, 2, 8)):
        scales = torch.tensor([0.25, 2.0, 0.01, 1.0])[:heads]
        x = torch.randn(tokens, heads, dim, generator=generator) * scales[:, None] * 20
        for fmt in (E4M3FN, *(f for f in FORMATS.values() if f is not E4M3FN)):
            x[1, 0, 1], x[2, 1, 0] = 2 * fmt.max * scales[0], -3 * fmt.max * scales[1]
            expected = quantize(x, scales[:, None], fmt.dtype)
            got = answer(x.clone(), scales.clone(), fmt)
            expect(expected, got, f"x {list(x.shape)} in {fmt.name}")
