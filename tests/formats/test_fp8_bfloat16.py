"""`decode_into_bfloat16`: one pass from FP8 codes to scaled BF16, for every finite code."""

import pytest
import torch

from kvgather.formats.fp8 import FORMATS, decode_into_bfloat16

FACTORS = (1.0, 0.37, 3.0, 1e-3, 1e-30, 1e-42, 100.0)


def _finite_codes(dtype: torch.dtype) -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[codes.view(dtype).float().isfinite()]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_every_finite_code_is_scaled_and_rounded_once(dtype: torch.dtype, factor: float) -> None:
    factor = float(torch.tensor(factor))
    codes = _finite_codes(dtype)
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    assert decode_into_bfloat16(codes, dtype, factor, out)
    assert torch.equal(out, (codes.view(dtype).float() * factor).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_codes_without_a_finite_value_are_declined(dtype: torch.dtype) -> None:
    all_codes = torch.arange(256, dtype=torch.uint8)
    for code in all_codes[~all_codes.view(dtype).float().isfinite()]:
        codes = torch.tensor([1, int(code)], dtype=torch.uint8)
        out = torch.full((2,), 7.0, dtype=torch.bfloat16)
        assert not decode_into_bfloat16(codes, dtype, 1.0, out)
        assert out.tolist() == [7.0, 7.0]


def test_a_factor_that_is_too_large_is_declined() -> None:
    out = torch.empty(1, dtype=torch.bfloat16)
    assert not decode_into_bfloat16(torch.ones(1, dtype=torch.uint8), torch.float8_e4m3fn, 1e6, out)


def test_flushed_subnormals_are_detected() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    try:
        out = torch.empty(1, dtype=torch.bfloat16)
        assert not decode_into_bfloat16(torch.ones(1, dtype=torch.uint8), torch.float8_e4m3fn, 1.0, out)
    finally:
        torch.set_flush_denormal(False)
