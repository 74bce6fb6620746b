"""Writing to the cache: quantize new tokens and scatter them into their slots, in plain torch or in Triton.

The two give the same bits. The kernel encodes FP8 with integer operations, so it needs no FP8 hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.layout import Geometry
from ..formats.scale import Scale
from ..gather.dispatch import choose_backend
from .reference import write_pool

if TYPE_CHECKING:  # the kernel needs Triton, which is not everywhere
    from .kernel import ScatterLaunch


class SlotError(ValueError):
    """Slots outside the cache were written to; the message gives the first."""


def scatter(
    key_cache: Tensor,
    value_cache: Tensor,
    geometry: Geometry,
    scales: tuple[Scale, Scale],
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    too_large: Tensor,
    backend: str,
) -> ScatterLaunch | None:
    """Write checked tokens.

    Args:
        key_cache, value_cache: pools of `geometry`.
        scales: K's and V's; per-token-head ones are computed and stored.
        k, v: `[n, heads, dim]`, floating point.
        slots: `[n]`; negative ones are skipped.
        too_large: int64 `[1]`; becomes the largest slot past the pool, where those are skipped (not on a CPU).

    Returns:
        The launch that wrote them, for others like it; None where plain torch did.

    Raises:
        SlotError: on a CPU, a slot is past the pool or comes twice.
    """
    num_slots = geometry.num_blocks * geometry.page_size
    if slots.device.type == "cpu":
        check_slots(slots, num_slots)
    if choose_backend(backend, slots.device) == "triton":
        from .kernel import ScatterLaunch

        launch = ScatterLaunch(key_cache, value_cache, geometry, scales, k, v, slots, too_large)
        launch(k, v, slots)
        return launch
    past = torch.where(slots < num_slots, -1, slots).amax().long()
    torch.maximum(too_large, past, out=too_large)
    kept = (slots >= 0) & (slots < num_slots)
    slots = slots[kept].long()
    block, slot = slots // geometry.page_size, slots % geometry.page_size
    write_pool(key_cache, geometry.layout, "key", scales[0], k[kept], block, slot)
    write_pool(value_cache, geometry.layout, "value", scales[1], v[kept], block, slot)
    return None


def check_slots(slots: Tensor, num_slots: int) -> None:
    """Raise SlotError unless every slot is below `num_slots` and comes once; negative ones are padding. Waits."""
    if slots.numel() == 0:
        return
    if int(slots.max()) >= num_slots:
        at = int((slots >= num_slots).nonzero()[0])
        raise SlotError(
            f"slots[{at}] is {int(slots[at])}; accepted: below {num_slots}, the slots of the cache, or negative for "
            "padding"
        )
    check_duplicates(slots)


def check_duplicates(slots: Tensor) -> None:
    """Raise SlotError if a slot comes twice; negative ones may. Waits."""
    ordered, order = slots.sort(stable=True)
    twice = ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).nonzero()
    if len(twice):
        first, second = sorted(int(i) for i in order[int(twice[0]) : int(twice[0]) + 2])
        raise SlotError(f"slots[{first}] and slots[{second}] are both {int(slots[first])}; accepted: each slot once")
