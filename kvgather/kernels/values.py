"""The values of a pool's elements, and back: decode, round, encode; the same bits compiled and in the interpreter.

The specification, in torch, is `formats.fp8`: `dequantize`, `quantize`, `computed_scale`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..formats.fp8 import SCALE_FLOOR

_SCALE_FLOOR = tl.constexpr(SCALE_FLOOR)
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def decode_fp8(codes, CODE: tl.constexpr, HARDWARE: tl.constexpr):
    """FP32 values of uint8 codes of CODE, an `Fp8Format`; exact for all 256.

    In software the bits are shifted to the fields of an FP32, which is 2^(127 − bias) times too small, subnormals
    included: `formats.fp8.decode` does the same with FP16.
    """
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
def widen(elements, CODE: tl.constexpr, HARDWARE: tl.constexpr):
    """FP32 values of a pool's elements: codes of CODE as uint8, or floats when CODE is None."""
    if CODE is not None:
        return decode_fp8(elements, CODE, HARDWARE)
    if elements.dtype == tl.bfloat16:
        return (elements.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return elements.to(tl.float32)


@triton.jit
def round_to(values, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """Round FP32 to nearest even; BY_HAND, for the interpreter, which would truncate to bfloat16."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def encode_fp8(values, CODE: tl.constexpr):
    """uint8 codes of FP32 values: clamped to ±max, rounded to nearest even, NaN to the NaN code."""
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


@triton.jit
def computed_scale(values, CODE: tl.constexpr):
    """The scale that maps the largest finite magnitude of each row of `[N, D]` onto CODE's maximum, `[N]`.

    The maximum is 1 for floats, where CODE is None. Never below `SCALE_FLOOR`.
    """
    MAX: tl.constexpr = 1.0 if CODE is None else CODE.max
    magnitude = tl.abs(values)
    finite = tl.where(magnitude <= _FLOAT32_MAX, magnitude, 0.0)  # the comparison is false for NaN as well
    return tl.maximum(tl.div_rn(tl.max(finite, axis=1), tl.full([values.shape[0]], MAX, tl.float32)), _SCALE_FLOOR)
