"""The reference, by examples that were worked out by hand. Keys are chosen so that e^score is a small number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvgather.attention.reference import reference_attention

LOG2, LOG3 = math.log(2), math.log(3)


def rows(*heads: list[list[float]]) -> Tensor:
    """`[n, heads, dim]` of what each head has, in float32."""
    return torch.tensor(heads).transpose(0, 1)


def offsets(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def close(got: Tensor, wanted: object) -> None:
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)


Q, K, V = rows([[1.0], [2.0]]), rows([[0.0], [LOG2], [LOG3]]), rows([[1.0], [4.0], [10.0]])


def test_two_new_tokens_after_one_cached() -> None:
    """Weights of the first: 1, 2. Of the second, whose query is 2: 1, 4, 9."""
    out, lse = reference_attention(Q, K, V, offsets(0, 2), offsets(0, 3), softmax_scale=1.0)
    close(out[:, 0], [[(1 + 2 * 4) / 3], [(1 + 4 * 4 + 9 * 10) / 14]])
    close(lse[:, 0], [math.log(3), math.log(14)])
    assert out.dtype == lse.dtype == torch.float64


def test_the_scale_multiplies_scores_and_is_the_root_of_the_dim_by_default() -> None:
    out, _ = reference_attention(Q, K, V, offsets(0, 2), offsets(0, 3), softmax_scale=2.0)
    close(out[0, 0], [(1 + 4 * 4) / 5])
    wide_q, wide_k = torch.ones(1, 1, 4), torch.tensor([[[0.0] * 4], [[LOG2 / 2] * 4]])  # 4 · log2/2 / √4 = log 2
    out, _ = reference_attention(wide_q, wide_k, V[:2], offsets(0, 1), offsets(0, 2))
    close(out[0, 0], [(1 + 2 * 4) / 3])


def test_a_window_counts_the_token_itself() -> None:
    for window, first, second in ((1, 4, 10), (2, 3, (4 * 4 + 9 * 10) / 13), (3, 3, 107 / 14), (99, 3, 107 / 14)):
        out, _ = reference_attention(Q, K, V, offsets(0, 2), offsets(0, 3), softmax_scale=1.0, window=window)
        close(out[:, 0], [[first], [second]])


def test_a_sink_is_in_the_denominator_alone() -> None:
    out, lse = reference_attention(Q, K, V, offsets(0, 2), offsets(0, 3), softmax_scale=1.0, sinks=torch.tensor([LOG2]))
    close(out[:, 0], [[9 / 5], [107 / 16]])
    close(lse[:, 0], [math.log(5), math.log(16)])


def test_a_very_large_sink_leaves_nothing_and_a_very_small_one_everything() -> None:
    call = (Q, K, V, offsets(0, 2), offsets(0, 3))
    without, _ = reference_attention(*call)
    out, lse = reference_attention(*call, sinks=torch.tensor([1e4]))
    assert out.eq(0).all() and lse.eq(1e4).all()
    out, _ = reference_attention(*call, sinks=torch.tensor([-1e4]))
    assert torch.equal(out, without)


@pytest.mark.parametrize(("sink", "wanted"), [(None, -math.inf), (-2.5, -2.5)])
def test_rows_that_see_nothing(sink: float | None, wanted: float) -> None:
    """A sequence without keys, one with fewer keys than queries, and a row that belongs to no sequence."""
    sinks = None if sink is None else torch.tensor([sink])
    q = torch.ones(5, 1, 1)
    out, lse = reference_attention(q, K, V, offsets(0, 1, 1, 4), offsets(0, 0, 1, 3), softmax_scale=1.0, sinks=sinks)
    assert out[[0, 1, 4]].eq(0).all() and lse[[0, 1, 4]].eq(wanted).all()
    extra = 0 if sink is None else math.exp(sink)
    close(out[2:4, 0], [[2 * 4 / (2 + extra)], [(2 * 4 + 3 * 10) / (5 + extra)]])


def test_query_heads_share_kv_heads_in_groups() -> None:
    """Four query heads over two KV heads: 0 and 1 read the first, 2 and 3 the second, each with its own sink."""
    q = torch.ones(1, 4, 1)
    k, v = rows([[0.0], [LOG2]], [[0.0], [LOG3]]), rows([[1.0], [4.0]], [[2.0], [6.0]])
    out, lse = reference_attention(q, k, v, offsets(0, 1), offsets(0, 2), softmax_scale=1.0)
    close(out[0, :, 0], [3, 3, 5, 5])
    close(lse[0], [math.log(3), math.log(3), math.log(4), math.log(4)])
    sinks = torch.tensor([0.0, LOG3, 0.0, LOG3])
    out, _ = reference_attention(q, k, v, offsets(0, 1), offsets(0, 2), softmax_scale=1.0, sinks=sinks)
    close(out[0, :, 0], [9 / 4, 9 / 6, 20 / 5, 20 / 7])


def test_v_may_have_another_dim_and_sequences_do_not_mix() -> None:
    q, k = torch.ones(2, 1, 2), torch.zeros(4, 1, 2)
    v = torch.tensor([[1.0, 2, 3], [3, 2, 1], [100, 100, 100], [200, 200, 200]])[:, None]
    out, _ = reference_attention(q, k, v, offsets(0, 1, 2), offsets(0, 2, 4))
    close(out[:, 0], [[2, 2, 2], [150, 150, 150]])
