"""The softmax of attention, a few keys at a time, and which keys a row sees.

For one row with scores s_j (in base 2: scale · log2 e · q·k_j) and values v_j, the keys so far are summed up by

    top = max_j s_j        total = Σ_j 2^(s_j − top)        acc = Σ_j 2^(s_j − top) · v_j

and softmax(s) · v = acc / total. A step over further keys raises `top` to top' and multiplies `total` and `acc` by
2^(top − top'): one pass over the keys, and no exponent above 0.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .merge import shift_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible(key, position, present, WINDOW: tl.constexpr):
    """Which of N keys each of M rows sees, `[M, N]`: present ones up to its own position, WINDOW at most (0: all).

    Args:
        key, present: `[N]`.
        position: `[M]`, of each row's token.
    """
    seen = present[None, :] & (key[None, :] <= position[:, None])
    if WINDOW > 0:
        seen = seen & (key[None, :] > position[:, None] - WINDOW)
    return seen


@triton.jit
def online_softmax_step(scores, row_scale, top, total, MASKED: tl.constexpr):
    """Add N keys to the running maximum and sum of each row.

    Args:
        scores: `[M, N]`, −inf where a row does not see a key; `scores * row_scale` are in base 2.
        row_scale: `[M]`, above 0.
        top, total: `[M]`, of the keys before.
        MASKED: whether a row may have seen no key yet.

    Returns:
        The keys' weights `[M, N]`, what earlier weights are multiplied by `[M]`, and the new top and total.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * row_scale)
    shift = shift_of(new_top) if MASKED else new_top
    p = tl.exp2(scores * row_scale[:, None] - shift[:, None])
    kept = tl.exp2(top - shift)
    return p, kept, new_top, total * kept + tl.sum(p, 1)


@triton.jit
def add_sink(sink, top, total, acc):
    """Add a sink to finished rows: a logit `[M]`, natural, that has a weight and no value; returns top, total, acc."""
    new_top = tl.maximum(top, sink * LOG2E)
    shift = shift_of(new_top)
    kept = tl.exp2(top - shift)
    return new_top, total * kept + tl.exp2(sink * LOG2E - shift), acc * kept[:, None]
