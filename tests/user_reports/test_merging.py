"""Merging partial states of which some saw no keys.

Reported as vllm-project/vllm#27491, #28181 and #15492, flashinfer-ai/flashinfer#4051.
"""

from __future__ import annotations

import math

import pytest
import torch

import kvgather as kg


@pytest.mark.parametrize("filling", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_parts_change_nothing(filling: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    out, lse = torch.randn(5, 3, 8, generator=random).to(dtype), torch.randn(5, 3, generator=random)
    nothing, empty = torch.full_like(out, filling), torch.full_like(lse, -math.inf)
    for merged in (kg.merge_states(out, lse, nothing, empty), kg.merge_states(nothing, empty, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    both = kg.merge_states(nothing, empty, nothing, empty)
    assert (both[0] == 0).all() and (both[1] == -math.inf).all()
    for _ in range(3):  # the union of empty parts stays an empty part
        both = kg.merge_states(*both, nothing, empty)
    assert torch.equal(kg.merge_states(*both, out, lse)[0], out)


@pytest.mark.parametrize("filling", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_may_be_empty_in_some_rows(filling: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    out, lse = torch.randn(5, 3, 8, generator=random).to(dtype), torch.randn(5, 3, generator=random)
    some = torch.where(torch.arange(5)[:, None] % 2 == 0, -math.inf, lse)
    part = torch.where(some[..., None] == -math.inf, filling, out.float()).to(dtype)
    merged, _ = kg.merge_states(part, some, out, lse)
    assert torch.equal(merged[::2], out[::2]) and not merged.isnan().any()


def test_plus_infinity_for_nothing() -> None:
    """FlashAttention 2 returns +inf for a row without keys."""
    out, lse = torch.ones(1, 1, 4), torch.zeros(1, 1)
    merged, merged_lse = kg.merge_states(out, lse, torch.zeros(1, 1, 4), torch.full((1, 1), math.inf))
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
