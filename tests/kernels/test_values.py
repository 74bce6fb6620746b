"""Values in kernels: decoded from the bit fields of all codes, encoded to the nearest one, rounded to nearest even."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgather.device import fp8_support, interpreting, triton_available
from kvgather.formats.fp8 import FORMATS, Fp8Format
from tests.where import on_each_device

if triton_available():
    import triton
    import triton.language as tl

    from kvgather.kernels.launch import launching
    from kvgather.kernels.values import encode_fp8, round_to, widen

    @triton.jit
    def convert_kernel(
        in_ptr, out_ptr, n,
        ENCODE: tl.constexpr, CODE: tl.constexpr, HARDWARE: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        given = tl.load(in_ptr + at, mask=at < n)
        if ENCODE:
            tl.store(out_ptr + at, encode_fp8(given, CODE), mask=at < n)
        else:
            tl.store(out_ptr + at, round_to(widen(given, CODE, HARDWARE), out_ptr.dtype.element_ty, BY_HAND), at < n)


def converted(given: Tensor, dtype: torch.dtype, **constants: Any) -> Tensor:
    out = torch.empty(given.shape, dtype=dtype, device=given.device)
    settings = {"ENCODE": False, "CODE": None, "HARDWARE": False, "BY_HAND": interpreting(), "BLOCK": 256, **constants}
    with launching(given, interpreting()):
        convert_kernel[(triton.cdiv(given.numel(), 256),)](given, out, given.numel(), **settings)
    return out.cpu()


def value_of(code: int, fmt: Fp8Format) -> float:
    """A code's value, from its fields."""
    sign, exponent, mantissa = code >> 7, code >> fmt.mantissa_bits & (1 << fmt.exponent_bits) - 1, 0
    mantissa = code & (1 << fmt.mantissa_bits) - 1
    ones = exponent == (1 << fmt.exponent_bits) - 1
    if (fmt.fnuz and code == 0x80) or (fmt.has_inf and ones and mantissa):
        return math.nan
    if fmt.name == "e4m3fn" and code & 0x7F == 0x7F:
        return math.nan
    if fmt.has_inf and ones:
        return -math.inf if sign else math.inf
    unit = 2.0 ** (max(exponent, 1) - fmt.bias - fmt.mantissa_bits)
    size = (mantissa + (1 << fmt.mantissa_bits if exponent else 0)) * unit
    return -size if sign else size


def same(got: Tensor, wanted: list[float]) -> None:
    """Equal, NaN to NaN, and zeros of the same sign."""
    expected = torch.tensor(wanted, dtype=got.dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers], expected[numbers])
    assert torch.equal(got[numbers].signbit(), expected[numbers].signbit())


@on_each_device
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_every_code_is_decoded_by_its_fields(fmt: Fp8Format, where: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=where)
    ways = {False, not interpreting() and fp8_support(where)[fmt.dtype] == "hardware"}
    for hardware in ways:
        same(converted(codes, torch.float32, CODE=fmt, HARDWARE=hardware), [value_of(c, fmt) for c in range(256)])


def nearest(value: float, fmt: Fp8Format, by_size: list[int]) -> int:
    """The positive code whose value is nearest; of two that are as near, the even one."""
    exact = Fraction(min(value, fmt.max))
    return min(by_size, key=lambda code: (abs(Fraction(value_of(code, fmt)) - exact), code & 1))


@on_each_device
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_values_are_encoded_to_the_nearest_code(fmt: Fp8Format, where: str) -> None:
    by_size = [code for code in range(128) if math.isfinite(value_of(code, fmt))]
    values = []
    for code in by_size:
        here = value_of(code, fmt)
        middle = (here + value_of(min(code + 1, by_size[-1]), fmt)) / 2
        values += [here, middle, middle * (1 - 2**-20), middle * (1 + 2**-20)]
    values += [fmt.max * 1.5, 3e38, math.inf, 2.0**-126, 1e-42]
    wanted = [nearest(value, fmt, by_size) for value in values]
    codes = converted(torch.tensor(values, device=where), torch.uint8, ENCODE=True, CODE=fmt)
    assert codes.tolist() == wanted
    codes = converted(-torch.tensor(values, device=where), torch.uint8, ENCODE=True, CODE=fmt)
    assert codes.tolist() == [code if fmt.fnuz and code == 0 else code | 0x80 for code in wanted]
    (code,) = converted(torch.tensor([math.nan], device=where), torch.uint8, ENCODE=True, CODE=fmt).tolist()
    assert math.isnan(value_of(code, fmt))


@on_each_device
def test_rounded_to_bfloat16_by_hand(where: str) -> None:
    """A mantissa of 7 bits: 1, 1 + 2^-7, 1 + 2^-6; between two of them the even one."""
    unit = 2.0**-7
    pairs = [
        (1 + unit / 2, 1.0), (1 + 3 * unit / 2, 1 + 2 * unit), (1 + unit / 2 + 2**-20, 1 + unit), (-1 - unit / 2, -1.0),
        (3.4e38, math.inf), (math.inf, math.inf), (-math.inf, -math.inf), (math.nan, math.nan), (-0.0, -0.0),
        (2.0**-133, 2.0**-133), (2.0**-134, 0.0),
    ]  # fmt: skip
    got = converted(torch.tensor([given for given, _ in pairs], device=where), torch.bfloat16)
    same(got, [wanted for _, wanted in pairs])


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floats_are_widened_exactly(dtype: torch.dtype, where: str) -> None:
    given = [0.0, -0.0, 1.5, -(2.0**-14), 2.0**-24, 65504.0, math.inf, -math.inf, math.nan]
    held = torch.tensor(given).to(dtype)
    same(converted(held.to(where), torch.float32), held.float().tolist())
