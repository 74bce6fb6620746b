"""Write to the cache: quantize new tokens and scatter them into their slots, in plain torch or in Triton.

Both backends write the same bits. The kernel encodes FP8 by integer operations and needs no FP8 hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.layout import Geometry
from ..formats.scale import Scale
from ..gather.dispatch import choose_backend
from .reference import write_pool

if TYPE_CHECKING:  # imports triton, which may be missing
    from .kernel import ScatterLaunch


class SlotError(ValueError):
    """A slot is outside the cache, or occurs twice; the message gives the first."""


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
        slots: `[n]`; negative slots are skipped.
        too_large: int64 `[1]`, updated to the largest slot past the pool. Such slots are skipped, except on a CPU.
        backend: "triton", "torch" or "auto".

    Returns:
        The launch of the Triton kernel, for later writes; None for plain torch.

    Raises:
        SlotError: on a CPU, a slot is past the pool or occurs twice.
    """
    num_slots = geometry.num_blocks * geometry.page_size
    if slots.device.type == "cpu":
        check_slots(slots, num_slots)
    if choose_backend(backend, slots.device) == "triton":
        from .kernel import ScatterLaunch

        launch = ScatterLaunch(key_cache, value_cache, geometry, scales, k, v, slots, too_large)
        launch(k, v, slots)
        return launch
    largest = torch.where(slots < num_slots, -1, slots).amax().long()
    torch.maximum(too_large, largest, out=too_large)
    in_pool = (slots >= 0) & (slots < num_slots)
    slots = slots[in_pool].long()
    block, page_offset = slots // geometry.page_size, slots % geometry.page_size
    write_pool(key_cache, geometry.layout, "key", scales[0], k[in_pool], block, page_offset)
    write_pool(value_cache, geometry.layout, "value", scales[1], v[in_pool], block, page_offset)
    return None


def check_slots(slots: Tensor, num_slots: int) -> None:
    """Raise SlotError unless every slot is below `num_slots` and unique, or negative. Synchronizes with the device."""
    if slots.numel() == 0:
        return
    if int(slots.max()) >= num_slots:
        first = int((slots >= num_slots).nonzero()[0])
        raise SlotError(
            f"slots[{first}] is {int(slots[first])}; accepted: below {num_slots}, the slots of the cache, or "
            "negative for padding"
        )
    check_duplicates(slots)


def check_duplicates(slots: Tensor) -> None:
    """Raise SlotError if a slot that is not negative occurs twice. Synchronizes with the device."""
    sorted_slots, order = slots.sort(stable=True)
    duplicates = ((sorted_slots[1:] == sorted_slots[:-1]) & (sorted_slots[1:] >= 0)).nonzero()
    if len(duplicates):
        first, second = sorted(int(i) for i in order[int(duplicates[0]) : int(duplicates[0]) + 2])
        raise SlotError(f"slots[{first}] and slots[{second}] are both {int(slots[first])}; accepted: each slot once")
