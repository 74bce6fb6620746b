"""Confusion of e4m3fn with e4m3fnuz. Reported as pytorch/FBGEMM#4113, vllm-project/vllm#45562."""

from __future__ import annotations

import math

import pytest
import torch

import kvgather as kg
from tests.user_reports.oracle import BACKENDS, FP8_MAX

pytestmark = pytest.mark.triton


def values_of_codes(dtype: torch.dtype) -> torch.Tensor:
    """The value of each of the 256 codes by the format's definition, float64."""
    bits, bias = {torch.float8_e4m3fn: (3, 7), torch.float8_e4m3fnuz: (3, 8), torch.float8_e5m2: (2, 15)}[dtype]
    values = []
    for code in range(256):
        sign, exponent, fraction = -1.0 if code >> 7 else 1.0, (code & 0x7F) >> bits, code & (2**bits - 1)
        normal = 2.0 ** (exponent - bias) * (1 + fraction / 2**bits)
        value = sign * (normal if exponent else 2.0 ** (1 - bias) * fraction / 2**bits)
        if dtype == torch.float8_e4m3fnuz and code == 0x80:
            value = math.nan
        if dtype == torch.float8_e4m3fn and code & 0x7F == 0x7F:
            value = math.nan
        if dtype == torch.float8_e5m2 and exponent == 31:
            value = sign * math.inf if fraction == 0 else math.nan
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FP8_MAX, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3, 3e-6, 7e3])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_of_every_format(
    backend: str, dtype: torch.dtype, scale: float, out_dtype: torch.dtype
) -> None:  # fmt: skip
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 1, 16)
    plan = kg.GatherPlan.build(torch.tensor([[1, 0]]), torch.tensor([0, 16]), page_size=8, num_blocks=2)
    k, v = kg.gather(
        codes.view(dtype), codes.flip(0).view(dtype), plan, k_scale=scale, v_scale=torch.full((1, 8), scale)[0, :1],
        out_dtype=out_dtype, backend=backend,
    )  # fmt: skip
    wanted = (values_of_codes(dtype).float() * torch.tensor(scale)).to(out_dtype).reshape(2, 8, 1, 16)
    for got, blocks in ((k, wanted.flip(0)), (v, wanted)):
        assert torch.equal(got.nan_to_num(nan=-12345.0), blocks.flatten(0, 1).nan_to_num(nan=-12345.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["per-tensor", "per-token-head"])
def test_values_that_round_to_minus_zero_are_zero_in_fnuz(backend: str, kind: str) -> None:
    cache = kg.PagedKVCache(2, 4, 1, 16, dtype=torch.float8_e4m3fnuz, scale=kind, device="cpu")
    x = torch.tensor([-0.0, -1e-9, -1e-30, -(2.0**-12), -(2.0**-11), -240, -300, 300, -(2.0**-10)] + [0.0] * 7)
    cache.write(x.reshape(1, 1, 16), x.reshape(1, 1, 16), torch.tensor([5]), backend=backend)
    codes = cache.key_cache.view(torch.uint8)[1, 1, 0]
    assert not (codes == 0x80).any()
    if kind == "per-tensor":
        wanted = [0, 0, 0, 0, 0, -240, -240, 240, -(2.0**-10)] + [0] * 7
        assert values_of_codes(torch.float8_e4m3fnuz)[codes.long()].tolist() == wanted
