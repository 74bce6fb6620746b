"""Tensor parallelism: a rank holds the pools and the scales of its own KV heads.

Rank r of n holds `num_kv_heads / n` consecutive heads, as the shards of the K and V projections do. The scale contract
holds on every rank: a per-tensor scale is that of all heads and is shared, and a scale with a head axis is sliced with
its heads. A `PagedKVCache` of a rank's pool and of its scale checks both.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor

from ..formats.checks import check_choice, check_int, described
from ..formats.scale import KINDS

_AXES = {"per-head": ("heads",), "per-page-head": ("blocks", "heads"), "per-token-head": ("blocks", "heads", "page")}


def heads_of(num_kv_heads: int, rank: int, ranks: int) -> range:
    """The KV heads that a rank holds.

    Example:
        >>> heads_of(8, rank=1, ranks=4)
        range(2, 4)

    Args:
        num_kv_heads: KV heads of the model.
        rank, ranks: this rank, and the number of ranks.

    Raises:
        TypeError, ValueError: an argument is wrong, or the heads do not divide by the ranks.
    """
    heads = check_int(num_kv_heads, "num_kv_heads", minimum=1)
    n = check_int(ranks, "ranks", minimum=1)
    r = check_int(rank, "rank", maximum=n - 1)
    if heads % n:
        raise ValueError(f"num_kv_heads is {heads}; accepted for {n} ranks: a multiple of {n}")
    return range(r * heads // n, (r + 1) * heads // n)


@overload
def scale_of_heads(
    scale: Tensor, kind: str, heads: range, *, num_kv_heads: int | None = None, name: str = "scale"
) -> Tensor: ...


@overload
def scale_of_heads(
    scale: Tensor | float | None, kind: str, heads: range, *, num_kv_heads: int | None = None, name: str = "scale"
) -> Tensor | float | None: ...


def scale_of_heads(
    scale: Tensor | float | None, kind: str, heads: range, *, num_kv_heads: int | None = None, name: str = "scale"
) -> Tensor | float | None:
    """The scale of some KV heads, of the scale of all.

    Args:
        scale: of all heads, in the shape of its kind: None, a float or a tensor (see `kvgather.formats.scale`).
        kind: one of `kvgather.formats.scale.KINDS`.
        heads: the heads, from `heads_of`.
        num_kv_heads: KV heads of the model; None accepts any number that includes `heads`.
        name: the argument's name, for errors.

    Returns:
        A scale without a head axis unchanged; otherwise a view of the heads, with the strides of `scale`.

    Raises:
        TypeError, ValueError: the scale has not the axes of its kind, or not all heads, because it was sliced before;
            or another argument is wrong.
    """
    check_choice(kind, "kind", KINDS)
    if not isinstance(heads, range):
        raise TypeError(f"heads is {described(heads)}; accepted: a range, from heads_of(...)")
    axes = _AXES.get(kind)
    if scale is None or axes is None:
        return scale
    if heads.step != 1 or not 0 <= heads.start < heads.stop:
        raise ValueError(f"heads is {heads}; accepted: consecutive heads")
    number = f"{heads.stop} or more" if num_kv_heads is None else str(num_kv_heads)
    wanted = ", ".join(number if axis == "heads" else axis for axis in axes)
    accepted = f"accepted for kind {kind} and {heads}, before it is sliced: a tensor of shape [{wanted}]"
    if not isinstance(scale, Tensor):
        raise TypeError(f"{name} is {described(scale)}; {accepted}")
    axis = axes.index("heads")
    if scale.ndim != len(axes) or scale.shape[axis] < heads.stop or num_kv_heads not in (None, scale.shape[axis]):
        raise ValueError(f"{name} has shape {list(scale.shape)}; {accepted}")
    return scale.narrow(axis, heads.start, len(heads))
