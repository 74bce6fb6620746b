"""From what a pool holds to what a kernel computes with, and back to what is stored; exact in the interpreter too."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_fp8(codes, CODE: tl.constexpr, HARDWARE: tl.constexpr):
    """FP32 values of uint8 codes of CODE, an `Fp8Format`; exact for all 256."""
    if CODE.name == "e5m2":
        if HARDWARE:
            values = codes.to(tl.float8e5, bitcast=True).to(tl.float32)
        else:
            values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif HARDWARE:
        if CODE.name == "e4m3fn":
            values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            values = codes.to(tl.float8e4b8, bitcast=True).to(tl.float32)
    else:
        wide = codes.to(tl.uint32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)  # an FP32 that is 2^(127 - bias) times too small
        values = bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - CODE.bias))
        if CODE.name == "e4m3fn":
            values = tl.where((wide & 0x7F) == 0x7F, float("nan"), values)
        else:
            values = tl.where(wide == 0x80, float("nan"), values)
    return values


@triton.jit
def widen(held, CODE: tl.constexpr, HARDWARE: tl.constexpr):
    """FP32 values of a pool's elements: codes of CODE as uint8, or floats, where CODE is None."""
    if CODE is not None:
        return decode_fp8(held, CODE, HARDWARE)
    if held.dtype == tl.bfloat16:
        return (held.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return held.to(tl.float32)


@triton.jit
def round_to(values, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """Round FP32 to nearest even; by hand where the interpreter would truncate to bfloat16."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def encode_fp8(values, CODE: tl.constexpr):
    """uint8 codes of FP32 values: clamped to the largest finite one, rounded to nearest even, NaN to the NaN code."""
    MANTISSA: tl.constexpr = CODE.mantissa_bits
    BIAS: tl.constexpr = CODE.bias
    MAX: tl.constexpr = CODE.max
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    nan = magnitude != magnitude
    magnitude = tl.where(nan | (magnitude > MAX), MAX, magnitude)
    dropped: tl.constexpr = 23 - MANTISSA
    wide = magnitude.to(tl.uint32, bitcast=True)
    normal = ((wide + ((wide >> dropped) & 1) + ((1 << (dropped - 1)) - 1)) >> dropped) - ((127 - BIAS) << MANTISSA)
    # Added to this, a subnormal's unit is the last bit of the sum's mantissa, so the addition rounds it.
    anchor: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    subnormal = (magnitude + anchor).to(tl.uint32, bitcast=True) - ((127 + 24 - BIAS - MANTISSA) << 23)
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    sign = (bits >> 24) & 0x80
    if CODE.fnuz:
        sign = tl.where(code == 0, 0, sign)
    return tl.where(nan, CODE.nan_code, code | sign).to(tl.uint8)
