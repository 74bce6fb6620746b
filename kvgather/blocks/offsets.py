"""`cu_seqlens`: sequence lengths as the prefix sums that packed batches use."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch

from ..device import resolve_device
from ..formats.checks import check_int, check_tensor, shown


def cu_seqlens(lengths: Iterable[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Prefix sums of sequence lengths: rows `cu_seqlens[b]` to `cu_seqlens[b + 1] - 1` of a packed batch belong to
    sequence b.

    Args:
        lengths: tokens of each sequence, integers >= 0: a list, or an integer tensor [batch], which is copied to the
            CPU.
        device: the device of the result.

    Returns:
        [batch + 1] int32; the first entry is 0.

    Raises:
        ValueError, TypeError: a length is negative or no integer, the sum exceeds 2**31 - 1, or no device of this
            machine.
    """
    target = resolve_device(device)
    numbers = number_list(lengths, "lengths")
    sums = list(accumulate((check_int(n, f"lengths[{b}]") for b, n in enumerate(numbers)), initial=0))
    check_int(sums[-1], "the sum of lengths")
    return torch.tensor(sums, dtype=torch.int32, device=target)


def number_list(values: object, name: str) -> list[Any]:
    """The items of an argument that is a list, another iterable or a tensor."""
    if isinstance(values, torch.Tensor):
        values = check_tensor(values, name).tolist()
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} is {shown(values)}; accepted: a list of integers, or an integer tensor [n]")
    return list(values)
