"""The two kernels of our direct path, each by itself, next to what `auto` takes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..attention.direct import direct_attention
from ..cases.prefix import BuiltPrefix
from ..hopper.plan import available, chosen_form
from .peer import Attending, NotUsable, Peer

DIRECT, HOPPER = "direct kernel", "Hopper kernel"
NAMES = (DIRECT, HOPPER)


def find(device: torch.device) -> dict[str, Peer]:
    """The kernels' rows, by name.

    Raises:
        NotUsable: the device has the direct kernel alone, which is then what `auto` takes on the direct path.
    """
    if not available(device):
        raise NotUsable("compared on a GPU of compute capability 9.0 with Triton 3.6")
    return {name: Peer("", partial(_prepare, name == HOPPER)) for name in NAMES}


def _prepare(hopper: bool, built: BuiltPrefix) -> Attending:
    """The call of one kernel, without the choice of a path and without its checks."""
    q, cache, batch = built.q, built.cache, built.batch
    likeness = cache.likeness
    n, q_heads, dim = q.shape
    if hopper and chosen_form(cache, batch, n, q_heads, q.dtype, None, likeness, forced=True) is None:
        raise NotUsable("the kernel does not run on this case")

    def attend() -> Tensor:
        out, _ = direct_attention(
            q, cache, batch, softmax_scale=dim**-0.5, likeness=likeness, want_lse=False, hopper=hopper
        )
        return out

    return attend
