"""FP8: every code of every format, and rounding at every midpoint, against values computed by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kvgather.formats import fp8
from kvgather.formats.fp8 import E4M3FN, E4M3FNUZ, E5M2, FORMATS, SCALE_FLOOR, Fp8Format

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
CODES = torch.arange(256, dtype=torch.uint8)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    nan = got.isnan() & expected.isnan()
    return bool(((got.view(torch.int32) == expected.view(torch.int32)) | nan).all())


def codes_of(values: list[float] | torch.Tensor, fmt: Fp8Format) -> list[int]:
    return fp8.quantize(torch.as_tensor(values, dtype=torch.float32), None, fmt.dtype).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    ("fmt", "code", "value"),
    [
        (E4M3FN, 0x00, 0.0),
        (E4M3FN, 0x38, 1.0),
        (E4M3FN, 0xBC, -1.5),
        (E4M3FN, 0x01, 2.0**-9),
        (E4M3FN, 0x07, 7 * 2.0**-9),
        (E4M3FN, 0x08, 2.0**-6),
        (E4M3FN, 0x7E, 448.0),
        (E4M3FN, 0x7F, math.nan),
        (E4M3FN, 0xFF, math.nan),
        (E4M3FN, 0x80, -0.0),
        (E4M3FNUZ, 0x40, 1.0),
        (E4M3FNUZ, 0x01, 2.0**-10),
        (E4M3FNUZ, 0x7F, 240.0),
        (E4M3FNUZ, 0xFF, -240.0),
        (E4M3FNUZ, 0x80, math.nan),
        (E5M2, 0x3C, 1.0),
        (E5M2, 0x01, 2.0**-16),
        (E5M2, 0x7B, 57344.0),
        (E5M2, 0x7C, math.inf),
        (E5M2, 0xFC, -math.inf),
        (E5M2, 0x7D, math.nan),
        (E5M2, 0xFF, math.nan),
    ],
)
def test_the_value_of_a_code(fmt: Fp8Format, code: int, value: float) -> None:
    got = fp8.decode(torch.tensor([code], dtype=torch.uint8), fmt.dtype)
    assert same_bits(got, torch.tensor([value]))


@every_format
def test_all_codes_decode_as_torch_decodes_them(fmt: Fp8Format) -> None:
    expected = CODES.view(fmt.dtype).float()
    assert same_bits(fp8.decode_table(fmt.dtype), expected)
    strided = CODES.view(16, 16).t()
    got = fp8.decode(strided, fmt.dtype)
    assert got.is_contiguous()
    assert same_bits(got, expected.view(16, 16).t().contiguous())
    assert fp8.decode(CODES[:0], fmt.dtype).shape == (0,)


@every_format
@pytest.mark.parametrize("factor", [1.0, 0.3, 1e-38, 1.2e-41, 3e38, 2.0**127, math.inf, math.nan])
def test_decoding_with_a_factor_rounds_once(fmt: Fp8Format, factor: float) -> None:
    factor = torch.tensor(factor).item()  # rounded to FP32
    assert same_bits(fp8.decode(CODES, fmt.dtype, factor), CODES.view(fmt.dtype).float() * torch.tensor(factor))


@every_format
@pytest.mark.parametrize("factor", [1.0, 0.3, -1.7, 1e-38, 1.2e-41, 3e38, 2.0**127, math.inf, math.nan])
def test_decoding_into_bfloat16_equals_decoding_through_fp32(fmt: Fp8Format, factor: float) -> None:
    factor = torch.tensor(factor).item()
    values = fp8.decode_table(fmt.dtype)
    for codes in (CODES, CODES[values.isfinite()], CODES[values.isfinite()][:37], CODES[:0]):
        expected = (codes.view(fmt.dtype).float() * torch.tensor(factor)).bfloat16()
        out = torch.full_like(expected, 7.0)
        if fp8.decode_into_bfloat16(codes, fmt.dtype, factor, out):
            assert same_bits(out.float(), expected.float())
        else:
            assert bool((out == 7.0).all())
            assert abs(factor) > 1e30 or math.isnan(factor) or codes is CODES
        wide = torch.full((len(codes), 3), 7.0, dtype=torch.bfloat16)
        if fp8.decode_into_bfloat16(codes, fmt.dtype, factor, wide[:, 1]):  # a strided output
            assert same_bits(wide[:, 1].float().contiguous(), expected.float())
            assert bool((wide[:, ::2] == 7.0).all())


@every_format
def test_the_attributes_of_a_format_match_its_values(fmt: Fp8Format) -> None:
    finite = [value for value in fp8.decode_table(fmt.dtype).tolist() if math.isfinite(value)]
    assert fmt.max == max(finite)
    assert fmt.min_normal == 2.0 ** (1 - fmt.bias)
    assert math.isnan(fp8.decode_table(fmt.dtype)[fmt.nan_code])
    assert fmt.has_inf == any(math.isinf(value) for value in fp8.decode_table(fmt.dtype).tolist())
    assert 1 + fmt.exponent_bits + fmt.mantissa_bits == 8
    assert fmt.fnuz == math.isnan(fp8.decode_table(fmt.dtype)[0x80])


@every_format
def test_every_finite_value_encodes_to_its_code(fmt: Fp8Format) -> None:
    values = fp8.decode_table(fmt.dtype)
    finite = values.isfinite()
    assert codes_of(values[finite], fmt) == CODES[finite].tolist()


@every_format
def test_encoding_rounds_to_nearest_even(fmt: Fp8Format) -> None:
    positive = [c for c in range(0x80) if math.isfinite(fp8.decode_table(fmt.dtype)[c])]
    for low, high in pairwise(positive):
        a, b = (fp8.decode_table(fmt.dtype)[[low, high]]).tolist()
        middle = (a + b) / 2
        below, above = (math.nextafter(middle, side) for side in (0.0, math.inf))
        below, above = below * (1 - 2**-20), above * (1 + 2**-20)
        even = low if low % 2 == 0 else high
        assert codes_of([below, middle, above], fmt) == [low, even, high], (a, b)
        minus = 0 if fmt.fnuz else 0x80  # fnuz has no negative zero
        signed = [code | (0x80 if code else minus) for code in (low, even, high)]
        assert codes_of([-below, -middle, -above], fmt) == signed, (-a, -b)


@every_format
def test_large_values_are_clamped_and_nan_stays_nan(fmt: Fp8Format) -> None:
    x = torch.tensor([fmt.max * 1.01, 3e38, math.inf, -fmt.max * 1.2, -math.inf, math.nan, -math.nan])
    got = fp8.quantize(x, None, fmt.dtype).float()
    assert got[:5].tolist() == [fmt.max, fmt.max, fmt.max, -fmt.max, -fmt.max]
    assert bool(got[5:].isnan().all())


@every_format
def test_tiny_values_become_a_zero_of_the_format(fmt: Fp8Format) -> None:
    smallest = fmt.min_normal / 2**fmt.mantissa_bits
    assert codes_of([smallest, smallest / 2, smallest * 0.501, 0.0, 1e-45], fmt) == [1, 0, 1, 0, 0]
    assert codes_of([-0.0, -smallest / 4], fmt) == [0 if fmt.fnuz else 0x80] * 2


def test_quantize_divides_by_the_scale_and_dequantize_multiplies() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scale = torch.tensor([[0.5], [2.0]])
    codes = fp8.quantize(x, scale, torch.float8_e4m3fn)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().tolist() == [[2.0, 4.0], [1.5, 2.0]]
    assert fp8.dequantize(codes, scale, torch.float32).tolist() == x.tolist()
    assert fp8.dequantize(codes, None, torch.bfloat16).tolist() == codes.float().tolist()
    assert fp8.quantize(x.half(), 0.5, torch.float8_e5m2).float().tolist() == [[2.0, 4.0], [6.0, 8.0]]


def test_zero_dimensional_results() -> None:
    assert fp8.quantize(torch.tensor(1.5), 0.5, torch.float8_e4m3fn).shape == ()
    assert fp8.computed_scale(torch.tensor([3.0]), torch.float16).shape == ()


def test_other_dtypes_are_rounded_and_not_clamped() -> None:
    x = torch.tensor([1.0 + 2**-9, 1e30, -math.inf])
    assert fp8.quantize(x, None, torch.bfloat16).tolist() == x.bfloat16().tolist()
    assert fp8.quantize(x, None, torch.float16).tolist() == [1.0 + 2**-9, math.inf, -math.inf]
    assert fp8.quantize(x, 2.0, torch.float32).tolist() == (x / 2).tolist()


@every_format
def test_a_computed_scale_maps_the_largest_finite_value_onto_max(fmt: Fp8Format) -> None:
    rows = torch.tensor(
        [
            [1.0, -2.0 * fmt.max, 3.0],
            [0.0, -0.0, 0.0],
            [math.inf, fmt.max, -math.nan],
            [math.nan, -math.inf, math.nan],
            [1e-45, 0.0, 0.0],
        ]
    )
    got = fp8.computed_scale(rows, fmt.dtype)
    assert got.dtype == torch.float32
    assert got.tolist() == [2.0, SCALE_FLOOR, 1.0, SCALE_FLOOR, SCALE_FLOOR]
    assert fp8.computed_scale(rows[:, :0], fmt.dtype).tolist() == [SCALE_FLOOR] * 5


def test_a_row_of_zeros_is_restored() -> None:
    zeros = torch.zeros(1, 4)
    scale = fp8.computed_scale(zeros, torch.float8_e4m3fn)
    codes = fp8.quantize(zeros, scale[:, None], torch.float8_e4m3fn)
    assert fp8.dequantize(codes, scale[:, None], torch.float32).tolist() == [[0.0] * 4]


def test_is_fp8() -> None:
    assert [fp8.is_fp8(dtype) for dtype in fp8.POOL_DTYPES] == [True, True, True, False, False, False]
    assert not fp8.is_fp8(torch.float8_e5m2fnuz)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e5m2fnuz, "float8_e4m3fn", None])
def test_unsupported_dtypes_are_rejected_by_name(dtype: object) -> None:
    with pytest.raises(TypeError, match=r"dtype .*accepted: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, bfloat16"):
        fp8.quantize(torch.zeros(1), None, dtype)
    with pytest.raises(TypeError, match=r"accepted: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2$"):
        fp8.decode(CODES, dtype)


@pytest.mark.gpu
@every_format
def test_a_gpu_divides_as_a_cpu_does(fmt: Fp8Format) -> None:
    rows = torch.randn(4096, 8)
    scale = fp8.computed_scale(rows, fmt.dtype)
    assert torch.equal(fp8.computed_scale(rows.cuda(), fmt.dtype).cpu(), scale)
    for divisor in (0.3, torch.tensor(0.3), scale[:, None]):
        gpu_divisor = divisor.cuda() if isinstance(divisor, torch.Tensor) else divisor
        got = fp8.quantize(rows.cuda(), gpu_divisor, fmt.dtype).cpu()
        assert torch.equal(got.view(torch.uint8), fp8.quantize(rows, divisor, fmt.dtype).view(torch.uint8))
        assert torch.equal(fp8.quantize(rows.cuda(), gpu_divisor, torch.float32).cpu(), rows / divisor)
