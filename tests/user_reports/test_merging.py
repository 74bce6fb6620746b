"""Merges of partial states, some of which have no visible keys.

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
    empty_out, empty_lse = torch.full_like(out, filling), torch.full_like(lse, -math.inf)
    for merged in (kg.merge_states(out, lse, empty_out, empty_lse), kg.merge_states(empty_out, empty_lse, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    both_empty = kg.merge_states(empty_out, empty_lse, empty_out, empty_lse)
    assert (both_empty[0] == 0).all() and (both_empty[1] == -math.inf).all()
    for _ in range(3):  # a merge of empty parts is an empty part
        both_empty = kg.merge_states(*both_empty, empty_out, empty_lse)
    assert torch.equal(kg.merge_states(*both_empty, out, lse)[0], out)


@pytest.mark.parametrize("filling", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_may_be_empty_in_some_rows(filling: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    out, lse = torch.randn(5, 3, 8, generator=random).to(dtype), torch.randn(5, 3, generator=random)
    partial_lse = torch.where(torch.arange(5)[:, None] % 2 == 0, -math.inf, lse)
    partial_out = torch.where(partial_lse[..., None] == -math.inf, filling, out.float()).to(dtype)
    merged, _ = kg.merge_states(partial_out, partial_lse, out, lse)
    assert torch.equal(merged[::2], out[::2]) and not merged.isnan().any()


def test_a_log_sum_exp_of_plus_infinity_means_no_keys() -> None:
    """FlashAttention 2 returns +inf for a row without keys."""
    out, lse = torch.ones(1, 1, 4), torch.zeros(1, 1)
    merged, merged_lse = kg.merge_states(out, lse, torch.zeros(1, 1, 4), torch.full((1, 1), math.inf))
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
