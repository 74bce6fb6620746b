"""FP8 formats: quantize, dequantize, and a software decode that is exact for all 256 codes.

A code consists of sign, exponent and mantissa. Shift its mantissa to the top of a wider format's mantissa: the bits are
then a number of the wider format that differs from the code's value by a power of two, also for subnormals. `decode`
uses FP16, because PyTorch converts FP16 to FP32 at memory speed on a CPU, and FP8 to FP32 about forty times slower. The
Triton kernels use FP32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import described, dtype_name

SCALE_FLOOR = torch.finfo(torch.float32).tiny
"""Smallest scale that a write computes: the scale of a row of zeros can be a divisor."""


@dataclass(frozen=True)
class Fp8Format:
    """One FP8 format.

    Attributes:
        name: as in `torch.float8_<name>`.
        dtype: the torch dtype.
        exponent_bits, mantissa_bits, bias: the fields of a code; a normal code has the value
            2^(e - bias) · (1 + m / 2^mantissa_bits).
        max: the largest finite value.
        min_normal: the smallest normal value.
        nan_code: a code of NaN.
        has_inf: whether the format has infinities.
        fnuz: "finite, no negative zero": the code 0x80, which is −0 in other formats, is the only NaN.

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
    """Whether a dtype is an FP8 format that a pool can store."""
    return dtype in FORMATS


def check_pool_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise TypeError unless a pool can store `dtype`."""
    if not isinstance(dtype, torch.dtype) or dtype not in POOL_DTYPES:
        accepted = ", ".join(dtype_name(d) for d in POOL_DTYPES)
        received = dtype_name(dtype) if isinstance(dtype, torch.dtype) else described(dtype)
        raise TypeError(f"{name} is {received}; accepted: {accepted}")


def format_of(dtype: torch.dtype, name: str = "dtype") -> Fp8Format:
    """Return the format of an FP8 dtype.

    Raises:
        TypeError: `dtype` is not FP8.
    """
    if dtype not in FORMATS:
        accepted = ", ".join(dtype_name(d) for d in FORMATS)
        raise TypeError(f"{name} is {dtype}; accepted: {accepted}")
    return FORMATS[dtype]


def code_max(dtype: torch.dtype) -> float:
    """Return the magnitude onto which a computed scale maps the largest value: the FP8 maximum, or 1 without FP8."""
    return FORMATS[dtype].max if dtype in FORMATS else 1.0


def quantize(x: Tensor, scale: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """Convert values to a pool's dtype: divide by the scale, clamp to ±max, round to nearest even.

    Args:
        x: values of any shape, floating point.
        scale: FP32, broadcastable against `x`; None skips the division.
        dtype: an FP8 dtype, or bfloat16, float16 or float32; values of the latter three are not clamped.

    Returns:
        A tensor of `dtype` in the shape of `x`. NaN stays NaN; in FP8, infinities become ±max.
    """
    check_pool_dtype(dtype, "dtype")
    values = x.float() if scale is None else x.float() / _divisor(scale, x)
    if dtype in FORMATS:
        values = values.clamp(-FORMATS[dtype].max, FORMATS[dtype].max)
    return values.to(dtype)


def _divisor(scale: Tensor | float, like: Tensor) -> Tensor:
    """Return a scale as a tensor: PyTorch on a GPU divides by tensors, but multiplies by a number's rounded inverse."""
    return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=like.device)


def dequantize(codes: Tensor, scale: Tensor | float | None, out_dtype: torch.dtype) -> Tensor:
    """Dequantize stored values: `(codes.float() * scale).to(out_dtype)`.

    Args:
        codes: any pool dtype, any shape.
        scale: FP32, broadcastable against `codes`; None skips the multiplication.
        out_dtype: a floating-point dtype.
    """
    values = codes.float()
    return (values if scale is None else values * scale).to(out_dtype)


def computed_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale that maps the largest finite magnitude of each row onto the format's maximum.

    Args:
        x: values `[..., dim]`.
        dtype: the pool's dtype.

    Returns:
        FP32 `[...]`, finite and at least `SCALE_FLOOR`; non-finite values in a row are ignored.
    """
    magnitude = x.float().abs()
    magnitude = torch.where(magnitude <= torch.finfo(torch.float32).max, magnitude, 0.0)
    largest = magnitude.amax(-1) if x.shape[-1] else magnitude.new_zeros(x.shape[:-1])
    return (largest / _divisor(code_max(dtype), largest)).clamp_min(SCALE_FLOOR)


def decode(codes: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Return the value of each FP8 code times a factor, by integer operations and one multiplication.

    Args:
        codes: uint8, any shape and strides.
        dtype: the FP8 dtype of the codes.
        factor: a number that FP32 can represent; applying it here saves a pass over the result.

    Returns:
        Contiguous FP32 in the shape of `codes`, equal to `codes.view(dtype).float() * factor`, NaN for NaN.
    """
    fmt = format_of(dtype)
    codes = codes.contiguous()
    signed = codes.view(torch.int8).to(torch.int16)
    if fmt is E5M2:  # the upper half of an FP16 number, also for infinities and NaN
        return signed.bitwise_left_shift_(8).view(torch.float16).float().mul_(factor)
    # Sign extension copies the sign over the upper byte: one shift moves it to bit 15, the mask clears bit 14.
    half = signed.bitwise_left_shift_(7).bitwise_and_(-0x4080)  # 0xBF80
    values = half.view(torch.float16).float()
    rebias = 2.0 ** (15 - fmt.bias)
    if rebias * factor <= torch.finfo(torch.float32).max:
        values.mul_(rebias * factor)  # rebias is a power of two: one product rounds as two successive products do
    else:
        values.mul_(rebias).mul_(factor)
    if _has_special(codes, fmt):
        values.masked_fill_(codes == fmt.nan_code if fmt.fnuz else (codes + codes) == 0xFE, math.nan)
    return values


def decode_into_bfloat16(codes: Tensor, dtype: torch.dtype, factor: float, out: Tensor) -> bool:
    """Fill `out` with `(codes.view(dtype).float() * factor).to(bfloat16)` in one pass, if possible.

    A code's shifted bits are also a BF16 number, too small by a power of two. PyTorch multiplies BF16 by a number in
    FP32 and rounds once. This moves two thirds fewer bytes than a conversion through FP32.

    Args:
        codes: uint8, contiguous, on a CPU.
        dtype: the FP8 dtype of the codes.
        factor: a number that FP32 can represent.
        out: bfloat16, in the shape of `codes`.

    Returns:
        Whether `out` was filled. It is unchanged if a code is NaN or infinite, if the factor times the power of two
        exceeds FP32, or if this thread flushes subnormal numbers to zero.
    """
    fmt = format_of(dtype)
    rebias = 2.0 ** (127 - fmt.bias)
    keeps_subnormals = bool(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1.0 > 0)
    if not (keeps_subnormals and rebias * factor <= torch.finfo(torch.float32).max) or _has_special(codes, fmt):
        return False
    shift = 7 - fmt.mantissa_bits
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(shift).bitwise_and_((0x7F << shift) - 0x8000)
    torch.mul(bits.view(torch.bfloat16), rebias * factor, out=out)
    return True


def _has_special(codes: Tensor, fmt: Fp8Format) -> bool:
    """Whether a code is NaN or infinite. Reads the codes, a quarter of the bytes of their FP32 values."""
    if codes.numel() == 0:
        return False
    if fmt.fnuz:
        return int(codes.view(torch.int8).amin()) == -128
    return int((codes + codes).amax()) >= (0xF8 if fmt.has_inf else 0xFE)  # doubling a code shifts its sign out


def decode_table(dtype: torch.dtype) -> Tensor:
    """Return the values of all 256 codes of an FP8 format: FP32 `[256]` on the CPU, indexed by code."""
    return decode(torch.arange(256, dtype=torch.uint8, device="cpu"), dtype)
