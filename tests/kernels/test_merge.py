"""The kernel that adds a partial state: each row by the formula, in Python's own floats."""

from __future__ import annotations

import math

import pytest
import torch

from kvgather.device import triton_available
from tests.where import on_each_device

if triton_available():
    from kvgather.kernels.merge import add_state

NOTHING = -math.inf
PAIRS = [
    (0.5, -1.0), (-3.0, 40.0), (1e4, 1e4), (-1e4, -1e4), (NOTHING, 0.3), (0.3, NOTHING), (0.3, math.inf),
    (NOTHING, NOTHING), (NOTHING, math.inf), (200.0, -200.0),
]  # fmt: skip
"""The log-sum-exp of the running state, and that of the part; +inf says "no keys" too."""


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_rows_by_the_formula(dim: int, dtype: torch.dtype, where: str) -> None:
    """Two heads, the second with the pairs in reverse; part and its log-sum-exp are views with strides."""
    rows = len(PAIRS)
    lse, part_lse = (torch.tensor([[p[i], q[i]] for p, q in zip(PAIRS, PAIRS[::-1], strict=True)]) for i in (0, 1))
    out = torch.randn(rows, 2, dim).masked_fill((lse == NOTHING)[..., None], 0)
    wide = torch.randn(rows, 3, 2 * dim).to(dtype)
    part = wide[:, 1:, ::2].masked_fill(part_lse.isinf()[..., None], 0)
    wanted, wanted_lse = torch.zeros(rows, 2, dim, dtype=torch.float64), torch.full((rows, 2), NOTHING)
    for row in range(rows):
        for head in range(2):
            a, b = float(lse[row, head]), float(part_lse[row, head])
            b = NOTHING if b == math.inf else b
            top = max(a, b)
            if top == NOTHING:
                continue
            weights = math.exp(a - top), math.exp(b - top)
            for i in range(dim):
                values = float(out[row, head, i]), float(part[row, head, i])
                wanted[row, head, i] = (weights[0] * values[0] + weights[1] * values[1]) / sum(weights)
            wanted_lse[row, head] = top + math.log(sum(weights))
    got, got_lse = out.to(where), lse.to(where)
    spread = torch.empty(2, rows, 2 * dim, dtype=dtype, device=where).transpose(0, 1)[..., ::2].copy_(part)
    add_state(got, got_lse, spread, part_lse.to(where).t().contiguous().t())
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_lse.cpu(), wanted_lse, rtol=1e-6, atol=1e-6)


@on_each_device
def test_no_rows_are_no_launch(where: str) -> None:
    empty = torch.zeros(0, 2, 3, device=where)
    add_state(empty, torch.zeros(0, 2, device=where), empty, torch.zeros(0, 2, device=where))
