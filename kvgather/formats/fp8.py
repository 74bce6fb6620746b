"""FP8 formats: quantize, dequantize, and a decode in software that is exact for all 256 codes.

A code is sign, exponent, mantissa. Shifted so that its mantissa ends up at the top of a wider format's mantissa, it
is that wider format's number times a power of two, subnormals included. `decode` uses FP16 for this because PyTorch
converts FP16 to FP32 at memory speed on a CPU, and FP8 to FP32 about forty times slower; the Triton kernels use FP32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import described, dtype_name

SCALE_FLOOR = torch.finfo(torch.float32).tiny
"""The smallest scale a write computes, so that a row of zeros has a scale that can be divided by."""


@dataclass(frozen=True)
class Fp8Format:
    """One FP8 format.

    Attributes:
        name: as in `torch.float8_<name>`.
        dtype: the torch dtype.
        exponent_bits, mantissa_bits, bias: the fields of a code; a normal code is 2^(e - bias) · (1 + m / 2^bits).
        max: the largest finite value.
        min_normal: the smallest normal value.
        nan_code: a code that means NaN.
        has_inf: whether there are codes for infinities.
        fnuz: "finite, no negative zero": the code 0x80, −0 elsewhere, is the one NaN.

    Source: OCP 8-bit floating point specification (e4m3fn, e5m2); arXiv:2206.02915 (fnuz).
    """

    name: str
    dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    nan_code: int
    has_inf: bool = False
    fnuz: bool = False

    @property
    def min_normal(self) -> float:
        return 2.0 ** (1 - self.bias)


E4M3FN = Fp8Format("e4m3fn", torch.float8_e4m3fn, 4, 3, 7, 448.0, 0x7F)
E4M3FNUZ = Fp8Format("e4m3fnuz", torch.float8_e4m3fnuz, 4, 3, 8, 240.0, 0x80, fnuz=True)
E5M2 = Fp8Format("e5m2", torch.float8_e5m2, 5, 2, 15, 57344.0, 0x7F, has_inf=True)

FORMATS: dict[torch.dtype, Fp8Format] = {fmt.dtype: fmt for fmt in (E4M3FN, E4M3FNUZ, E5M2)}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
POOL_DTYPES = (*FORMATS, *FLOATS)


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of the FP8 formats a pool can hold."""
    return dtype in FORMATS


def check_pool_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise TypeError unless a pool may hold `dtype`."""
    if not isinstance(dtype, torch.dtype) or dtype not in POOL_DTYPES:
        accepted = ", ".join(dtype_name(d) for d in POOL_DTYPES)
        came = dtype_name(dtype) if isinstance(dtype, torch.dtype) else described(dtype)
        raise TypeError(f"{name} is {came}; accepted: {accepted}")


def format_of(dtype: torch.dtype, name: str = "dtype") -> Fp8Format:
    """The format of an FP8 dtype.

    Raises:
        TypeError: `dtype` is not FP8.
    """
    if dtype not in FORMATS:
        accepted = ", ".join(dtype_name(d) for d in FORMATS)
        raise TypeError(f"{name} is {dtype}; accepted: {accepted}")
    return FORMATS[dtype]


def code_max(dtype: torch.dtype) -> float:
    """The largest magnitude that a computed scale maps onto: the format's maximum, or 1 in a pool that isn't FP8."""
    return FORMATS[dtype].max if dtype in FORMATS else 1.0


def quantize(x: Tensor, scale: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """Store values in a pool's dtype: divide by the scale, clamp to ±max, round to nearest even.

    Args:
        x: values, any shape, floating point.
        scale: FP32, broadcastable against `x`; None divides by nothing.
        dtype: an FP8 dtype, or bfloat16, float16, float32, which are rounded to and not clamped.

    Returns:
        A tensor of `dtype`, shaped like `x`. NaN stays NaN; infinities become ±max.
    """
    check_pool_dtype(dtype, "dtype")
    values = x.float() if scale is None else x.float() / _divisor(scale, x)
    if dtype in FORMATS:
        values = values.clamp(-FORMATS[dtype].max, FORMATS[dtype].max)
    return values.to(dtype)


def _divisor(scale: Tensor | float, like: Tensor) -> Tensor:
    """A scale as a tensor: on a GPU PyTorch divides by a tensor, but multiplies by the rounded inverse of a number."""
    return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=like.device)


def dequantize(codes: Tensor, scale: Tensor | float | None, out_dtype: torch.dtype) -> Tensor:
    """What stored values mean: `(codes.float() * scale).to(out_dtype)`.

    Args:
        codes: any pool dtype, any shape.
        scale: FP32, broadcastable against `codes`; None multiplies by nothing.
        out_dtype: a floating-point dtype.
    """
    values = codes.float()
    return (values if scale is None else values * scale).to(out_dtype)


def computed_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that maps the largest finite magnitude of each row onto the format's maximum.

    Args:
        x: values `[..., dim]`.
        dtype: the pool's dtype.

    Returns:
        FP32 `[...]`, never below `SCALE_FLOOR`, never NaN or infinite: what isn't finite in a row doesn't count.
    """
    magnitude = x.float().abs()
    magnitude = torch.where(magnitude <= torch.finfo(torch.float32).max, magnitude, 0.0)
    largest = magnitude.amax(-1) if x.shape[-1] else magnitude.new_zeros(x.shape[:-1])
    return (largest / _divisor(code_max(dtype), largest)).clamp_min(SCALE_FLOOR)


def decode(codes: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """The value of each FP8 code times a factor, with integer operations and one multiplication.

    Args:
        codes: uint8, any shape and strides.
        dtype: the FP8 dtype the codes are in.
        factor: a number that FP32 can hold; folding it in here saves a pass over the result.

    Returns:
        FP32, shaped like `codes`, contiguous; equal to `codes.view(dtype).float() * factor`, NaN for NaN.
    """
    fmt = format_of(dtype)
    codes = codes.contiguous()
    signed = codes.view(torch.int8).to(torch.int16)
    if fmt is E5M2:  # the upper half of an FP16, infinities and NaNs too
        return signed.bitwise_left_shift_(8).view(torch.float16).float().mul_(factor)
    # The sign was extended over the upper byte, so one shift puts it in place and the mask clears its copy.
    half = signed.bitwise_left_shift_(7).bitwise_and_(-0x4080)  # 0xBF80
    values = half.view(torch.float16).float()
    unit = 2.0 ** (15 - fmt.bias)
    if unit * factor <= torch.finfo(torch.float32).max:
        values.mul_(unit * factor)  # a power of two: rounds as the two products one after the other would
    else:
        values.mul_(unit).mul_(factor)
    if _has_special(codes, fmt):
        values.masked_fill_(codes == fmt.nan_code if fmt.fnuz else (codes + codes) == 0xFE, math.nan)
    return values


def decode_into_bfloat16(codes: Tensor, dtype: torch.dtype, factor: float, out: Tensor) -> bool:
    """Fill `out` with `(codes.view(dtype).float() * factor).to(bfloat16)` in one pass, where that can be done.

    A code's bits also make a BF16 that is a power of two too small, and PyTorch multiplies BF16 by a number in FP32
    and rounds once. That is two thirds fewer bytes than going through FP32.

    Args:
        codes: uint8, contiguous, on a CPU.
        dtype: the FP8 dtype the codes are in.
        factor: a number that FP32 can hold.
        out: bfloat16, shaped like `codes`.

    Returns:
        Whether it was done. It is not if a code is NaN or infinite, the factor is too large to be folded in, or this
        thread flushes subnormal numbers to zero; `out` is then untouched.
    """
    fmt = format_of(dtype)
    unit = 2.0 ** (127 - fmt.bias)
    keeps_subnormals = bool(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1.0 > 0)
    if not (keeps_subnormals and unit * factor <= torch.finfo(torch.float32).max) or _has_special(codes, fmt):
        return False
    shift = 7 - fmt.mantissa_bits
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(shift).bitwise_and_((0x7F << shift) - 0x8000)
    torch.mul(bits.view(torch.bfloat16), unit * factor, out=out)
    return True


def _has_special(codes: Tensor, fmt: Fp8Format) -> bool:
    """Whether a code is NaN or infinite; looks at bytes, a quarter of the memory that the values are."""
    if codes.numel() == 0:
        return False
    if fmt.fnuz:
        return int(codes.view(torch.int8).amin()) == -128
    return int((codes + codes).amax()) >= (0xF8 if fmt.has_inf else 0xFE)  # the sum drops the sign


def decode_table(dtype: torch.dtype) -> Tensor:
    """The values of all 256 codes of an FP8 format, FP32 `[256]` on the CPU; index it with a code."""
    return decode(torch.arange(256, dtype=torch.uint8, device="cpu"), dtype)
