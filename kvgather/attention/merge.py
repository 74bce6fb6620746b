"""Partial attention states: the output and log-sum-exp of rows over one set of keys, and over another, merge into those
over both.

A part with log-sum-exp l, the log of its softmax denominator, weighs e^l:

    out = (e^a · out_a + e^b · out_b) / (e^a + e^b)        lse = log(e^a + e^b)

A sink is a part that has a denominator and no values: out_b = 0. The formula is evaluated in three ways, which round
differently, each for a reason that the function gives; a part whose log-sum-exp is −inf has weight 0 in all.
`kernels.merge` is the twin in Triton.

Source: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), as cascade inference merges it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.checks import check_tensor, resolved
from ..formats.fp8 import FLOATS
from ..gather.dispatch import choose_backend


@torch.no_grad()
def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge what the same queries saw in two disjoint sets of keys.

    Args:
        out_a, out_b: `[n, heads, dim]`, bfloat16, float16 or float32. Where a log-sum-exp is −inf they may hold
            anything.
        lse_a, lse_b: `[n, heads]` float32, natural; −inf where a query saw nothing. +inf, which FlashAttention 2
            returns for rows without keys and for rows of NaN, is −inf unless the row of its out holds a NaN.

    Returns:
        out `[n, heads, dim]`, in the dtype that both promote to, and lse `[n, heads]` float32. Where one side saw
        nothing it is exactly the other; where both saw nothing, 0 and −inf. A NaN that was seen stays NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    out_a, lse_a, out_b, lse_b = (resolved(given) for given in (out_a, lse_a, out_b, lse_b))
    check_tensor(out_a, "out_a", ndim=3, dtypes=FLOATS)
    for name, tensor, dtypes, shape in (
        ("lse_a", lse_a, (torch.float32,), out_a.shape[:2]),
        ("out_b", out_b, FLOATS, out_a.shape),
        ("lse_b", lse_b, (torch.float32,), out_a.shape[:2]),
    ):
        check_tensor(tensor, name, ndim=len(shape), dtypes=dtypes, device=out_a.device)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted for out_a of shape {list(out_a.shape)}: {list(shape)}"
            )
    lse_a, lse_b = _without_plus_infinity(out_a, lse_a), _without_plus_infinity(out_b, lse_b)
    no_a, no_b = lse_a == -math.inf, lse_b == -math.inf
    # Divided by the sum of the weights: e to the merged log-sum-exp would add a relative error of |lse| · 2^-24.
    top = torch.maximum(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)  # one of them is 1
    total = weight_a + weight_b
    out = out_a.float() * (weight_a / total)[..., None] + out_b.float() * (weight_b / total)[..., None]
    # Chosen, not multiplied by 0: a side that saw nothing may hold NaN, and the other has to stay as it is.
    out = torch.where(no_a[..., None], out_b.float(), torch.where(no_b[..., None], out_a.float(), out))
    out = out.masked_fill((no_a & no_b)[..., None], 0)
    lse = torch.where(no_a, lse_b, torch.where(no_b, lse_a, top + total.log()))
    return out.to(torch.promote_types(out_a.dtype, out_b.dtype)), lse


def _without_plus_infinity(out: Tensor, lse: Tensor) -> Tensor:
    """A part's log-sum-exp with −inf for +inf, and NaN for that of a row of NaN: both then weigh what they should."""
    return torch.where(lse == math.inf, torch.where(out.isnan().any(-1), math.nan, -math.inf), lse)


@torch.no_grad()
def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add a sink to the denominator of finished rows; once, when everything is merged.

    Args:
        out: `[n, heads, dim]`.
        lse: `[n, heads]` float32, without the sink.
        sinks: `[heads]`, a logit per head.

    Returns:
        out in its dtype and the log-sum-exp with the sink. Rows that saw nothing are 0, and the sink.
    """
    # e^lse / (e^lse + e^sink) is a sigmoid: one pass over [n, heads], and exact at both ends.
    logits = sinks.float()
    share = torch.where(lse == -math.inf, 0, torch.sigmoid(lse - logits))
    return (out * share[..., None]).to(out.dtype), torch.logaddexp(lse, logits.expand_as(lse))


class RunningState:
    """The partial state of rows of q over the keys so far.

    Attributes:
        out: `[n, heads, dim]`; FP32 if states are to be merged.
        lse: `[n, heads]` FP32, natural, −inf where nothing was seen.
    """

    def __init__(
        self, rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
    ) -> None:
        self.out = torch.zeros((rows, heads, dim), dtype=dtype, device=device)
        self.backend = backend
        self.lse = torch.full((rows, heads), -torch.inf, dtype=torch.float32, device=device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge what `rows` saw in other keys, in place: a second copy of the state would exceed the workspace bound.

        Args:
            rows: of this state.
            out: `[rows, heads, dim]`, any float dtype, 0 where `lse` is −inf or +inf.
            lse: `[rows, heads]` FP32; a row with −inf or +inf weighs 0.
        """
        state_out, state_lse = self.out[rows], self.lse[rows]
        if choose_backend(self.backend, out.device) == "triton":
            from ..kernels.merge import add_state  # needs triton, which this module does not

            add_state(state_out, state_lse, out, lse)
            return
        # Weights e^(l − merged) need no division of `out`, so the state is scaled and added to where it is.
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        merged = torch.logaddexp(state_lse, lse)
        base = torch.where(merged == -torch.inf, 0, merged)  # −inf less −inf would be NaN
        state_out *= torch.exp(state_lse - base)[..., None]
        state_out.addcmul_(out, torch.exp(lse - base)[..., None])
        state_lse.copy_(merged)

    def put(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Set what `rows` saw, where that is all they see."""
        self.out[rows], self.lse[rows] = out, lse
