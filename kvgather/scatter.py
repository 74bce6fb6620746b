"""Writing to the cache: quantize new tokens and scatter them into their slots, in plain torch and in Triton.

The two give the same bits. The kernel encodes FP8 with integer operations, so it needs no FP8 hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .formats.fp8 import FORMATS, computed_scale, quantize
from .formats.layout import Geometry, Which
from .formats.scale import Scale
from .gather.dispatch import choose_backend

if TYPE_CHECKING:  # the kernel needs Triton, which is not everywhere
    from .scatter_kernel import ScatterLaunch


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
        from .scatter_kernel import ScatterLaunch

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


def write_pool(
    pool: Tensor, layout: str, which: Which, scale: Scale, rows: Tensor, block: Tensor, slot: Tensor
) -> None:
    """Quantize `rows` `[n, heads, dim]` and put row i into (block[i], slot[i]) of one pool; indices are int64 `[n]`."""
    if scale.kind == "per-token-head":
        assert scale.tensor is not None
        scale.tensor[block, :, slot] = computed_scale(rows, pool.dtype)  # [n, heads]
    heads = torch.arange(rows.shape[1], device=pool.device)
    factor = scale.at(block[:, None], heads, slot[:, None])  # [n, heads] or less
    codes = quantize(rows, factor if factor is None or factor.ndim == 0 else factor[..., None], pool.dtype)
    if pool.dtype in FORMATS:
        codes, pool = codes.view(torch.uint8), pool.view(torch.uint8)
    if layout == "NHD":
        pool[block, slot] = codes
    elif layout == "HND":
        pool[block, :, slot] = codes
    elif which == "key":
        pool[block, :, :, slot] = codes.unflatten(2, (-1, pool.shape[4]))
    else:
        x = pool.shape[4]
        pool[block, :, slot // x, :, slot % x] = codes


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
