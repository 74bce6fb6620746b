"""Number formats in plain arithmetic: what a byte of FP8 means, and what a number becomes in a format.

An oracle: nothing here comes from the package, nor from torch.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache, lru_cache


@dataclass(frozen=True)
class Format:
    """Fields of an FP8 format; `largest` is its largest finite value."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float


FP8 = {
    "float8_e4m3fn": Format(4, 3, 7, 448.0),
    "float8_e4m3fnuz": Format(4, 3, 8, 240.0),
    "float8_e5m2": Format(5, 2, 15, 57344.0),
}
TINY = 2.0**-126
"""FP32's smallest normal number."""


@cache
def decode(code: int, name: str) -> float:
    """The value of a byte, by its sign, exponent and mantissa."""
    fmt = FP8[name]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code & 0x7F) >> fmt.mantissa_bits
    mantissa = code & ((1 << fmt.mantissa_bits) - 1)
    if name == "float8_e4m3fnuz" and code == 0x80:
        return math.nan
    if name == "float8_e4m3fn" and (code & 0x7F) == 0x7F:
        return math.nan
    if name == "float8_e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - fmt.bias - fmt.mantissa_bits)
    return sign * math.ldexp((1 << fmt.mantissa_bits) + mantissa, exponent - fmt.bias - fmt.mantissa_bits)


@cache
def _finite(name: str) -> list[tuple[float, int]]:
    """Values and codes that are not negative and finite, in order."""
    values = [(decode(code, name), code) for code in range(128)]
    return sorted(pair for pair in values if math.isfinite(pair[0]))


@lru_cache(maxsize=1 << 16)
def _nearest(magnitude: float, name: str) -> int:
    """The code of the nearest value that is not negative, ties to the even code."""
    table = _finite(name)
    low, high = 0, len(table) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if table[middle][0] <= magnitude else (low, middle)
    under, over = magnitude - table[low][0], table[high][0] - magnitude
    return table[low][1] if under < over or (under == over and table[low][1] % 2 == 0) else table[high][1]


def encode(value: float, name: str) -> int | None:
    """The byte of the nearest value, magnitudes past the largest clamped; None for NaN."""
    if math.isnan(value):
        return None
    code = _nearest(min(abs(value), FP8[name].largest), name)
    if name == "float8_e4m3fnuz" and code == 0:
        return 0  # this format has no negative zero
    return code | (0x80 if math.copysign(1.0, value) < 0 else 0)


def to_float32(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def to_float16(value: float) -> float:
    try:
        return struct.unpack("<e", struct.pack("<e", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def to_bfloat16(value: float) -> float:
    """The nearest bfloat16 of an FP32 number, ties to even."""
    if not math.isfinite(value):
        return value
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


ROUND = {"float32": to_float32, "float16": to_float16, "bfloat16": to_bfloat16}


def product(a: float, b: float) -> float:
    """Two FP32 numbers multiplied in FP32: a float holds the product exactly, and is rounded once."""
    return to_float32(a * b)


def quotient(a: float, b: float) -> float:
    """Two FP32 numbers divided in FP32. Rounded twice, which for numbers of 24 bits is as good as once."""
    if b == 0 or math.isnan(a) or math.isnan(b):
        signs = math.copysign(1.0, a) * math.copysign(1.0, b)
        return math.nan if math.isnan(a) or math.isnan(b) or a == 0 else math.copysign(math.inf, signs)
    if math.isinf(a) and math.isinf(b):
        return math.nan
    return to_float32(a / b)


def name_of(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
