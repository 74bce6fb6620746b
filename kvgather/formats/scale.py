"""The scale contract: a scale's shape determines its kind, and its strides are those of its tensor.

| kind | shape | strides the kernels use (block, head, slot) |
| --- | --- | --- |
| none | None | no scale is read |
| per-tensor | a float, or any tensor with one element | 0, 0, 0 |
| per-head | `[heads]` | 0, s0, 0 |
| per-page-head | `[blocks, heads]` | s0, s1, 0 |
| per-token-head | `[blocks, heads, page]` | s0, s1, s2 |

The crash that this package is about came from an address computed with strides that a one-element scale does not have.
No other module interprets a scale's shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_choice, check_positive, check_tensor

KINDS = ("none", "per-tensor", "per-head", "per-page-head", "per-token-head")


@dataclass(frozen=True)
class Scale:
    """A scale that has been checked against its cache.

    Attributes:
        kind: one of `KINDS`.
        tensor: FP32 on the cache's device; None if there is no scale, or if `number` has its value.
        number: the value of a per-tensor scale that is a number; creating a tensor for it would cost a launch.
        stride_block, stride_head, stride_slot: in elements; 0 along every axis that the scale does not have.
    """

    kind: str
    tensor: Tensor | None
    stride_block: int = 0
    stride_head: int = 0
    stride_slot: int = 0
    number: float | None = None

    @classmethod
    def of(cls, kind: str, tensor: Tensor | None) -> Scale:
        """Create a scale of a known kind, with its tensor's strides along the axes of that kind."""
        axes = {"per-head": "h", "per-page-head": "bh", "per-token-head": "bhs"}.get(kind, "")
        strides = dict(zip(axes, tensor.stride(), strict=True)) if tensor is not None and axes else {}
        return cls(kind, tensor, strides.get("b", 0), strides.get("h", 0), strides.get("s", 0))

    @property
    def strides(self) -> tuple[int, int, int]:
        """Strides of blocks, heads and slots, as kernels take them."""
        return self.stride_block, self.stride_head, self.stride_slot

    def in_memory(self, device: torch.device) -> Scale:
        """Return the same scale with a number stored in a one-element tensor."""
        if self.number is None:
            return self
        return Scale(self.kind, torch.full((1,), self.number, dtype=torch.float32, device=device))

    def at(self, block: Tensor, head: Tensor, page_offset: Tensor) -> Tensor | None:
        """Return the scale of each (block, head, page_offset); the indices are int64 and broadcast.

        Returns:
            FP32 with the shape that the indices broadcast to along the axes that the scale has (1 along the others), or
            None if there is no scale.
        """
        if self.number is not None:
            return torch.full((), self.number, dtype=torch.float32, device=block.device)
        if self.tensor is None:
            return None
        if self.kind == "per-tensor":
            return self.tensor.reshape(())
        if self.kind == "per-head":
            return self.tensor[head]
        if self.kind == "per-page-head":
            return self.tensor[block, head]
        return self.tensor[block, head, page_offset]


def kind_shape(kind: str, num_blocks: int, num_heads: int, page_size: int) -> tuple[int, ...]:
    """Return the shape of a scale of a kind; `()` for per-tensor.

    Raises:
        ValueError: the kind is unknown, or is "none", which has no shape.
    """
    check_choice(kind, "kind", KINDS[1:])
    return {
        "per-tensor": (),
        "per-head": (num_heads,),
        "per-page-head": (num_blocks, num_heads),
        "per-token-head": (num_blocks, num_heads, page_size),
    }[kind]


def classify(
    scale: Tensor | float | None,
    name: str,
    *,
    num_blocks: int,
    num_heads: int,
    page_size: int,
    kind: str | None = None,
) -> str:
    """Return the kind of a scale.

    None is "none". A float, and a tensor with one element and any rank, is "per-tensor". Otherwise the rank determines
    the kind, and the shape must match that kind exactly. A shape that two kinds share always resolves the same way:
    with one head, `[1]` is per-tensor; with one block and one head, `[1, 1]` is per-tensor; with page 1,
    `[blocks, heads, 1]` is per-token-head. `kind` overrides this rule: the scale must then have the shape of that kind,
    and a one-element scale is rejected as per-head in a cache with eight heads.

    Args:
        scale: None, a float or a tensor.
        name: the argument's name, for errors.
        num_blocks, num_heads, page_size: of the scale's cache.
        kind: one of `KINDS`, or None to derive it from the shape.

    Raises:
        ValueError: the shape matches no kind, or not the requested kind.
    """
    if kind is not None:
        check_choice(kind, f"{name.replace('_scale', '')}_kind", KINDS)
    if scale is None:
        if kind not in (None, "none"):
            raise ValueError(f"{name} is None; accepted for kind {kind}: a scale")
        return "none"
    if kind == "none":
        raise ValueError(f"{name} was given; accepted for kind none: None")
    shape = tuple(scale.shape) if isinstance(scale, Tensor) else ()
    one = math.prod(shape) == 1
    if one and kind in (None, "per-tensor"):
        return "per-tensor"
    shapes = {k: kind_shape(k, num_blocks, num_heads, page_size) for k in KINDS[2:]}
    if kind is None:
        fits = [k for k, wanted in shapes.items() if shape == wanted]
        if fits:
            return fits[0]
    elif shape == shapes.get(kind):
        return kind
    received = f"shape {list(shape)}" if isinstance(scale, Tensor) else f"the value {scale}"
    options = {"per-tensor": "one element (per-tensor)"} | {k: str(list(s)) for k, s in shapes.items()}
    accepted = ", ".join(options.values()) if kind is None else options[kind]
    as_kind = "" if kind is None else f" as {kind}"
    raise ValueError(
        f"{name} has {received}; accepted for {num_heads} heads, {num_blocks} blocks, page {page_size}{as_kind}: "
        f"{accepted}{_hint(shape, shapes, name) if isinstance(scale, Tensor) and kind is not None else ''}"
    )


def _hint(shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]], name: str) -> str:
    """Suggest the kind that a scale's shape matches, which is not the requested one."""
    match = next((kind for kind, wanted in shapes.items() if shape == wanted), None)
    if match is None and math.prod(shape) == 1:
        match = "per-tensor"
    if match is None:
        return ""
    return f'; a scale of this shape is {match}: scale="{match}", or {name.replace("_scale", "")}_kind="{match}"'


def check_values(scale: Scale, name: str) -> None:
    """Raise unless every value of a scale is finite and positive. Synchronizes if the scale is on a GPU.

    Raises:
        ValueError: a value is NaN, infinite, zero or negative; the message gives the first one and its index.
    """
    if scale.tensor is None or (scale.tensor.numel() == 1 and 0 < scale.tensor.item() < math.inf):
        return  # a fast check of one value: every gather on a CPU runs it
    valid = torch.isfinite(scale.tensor) & (scale.tensor > 0)
    if not bool(valid.all()):
        first = (~valid).nonzero()[0].tolist()
        value = scale.tensor[tuple(first)].item()
        where = f" at {first}" if first else ""
        raise ValueError(f"{name} is {value}{where}; accepted: finite values above 0")


_SMALLEST, _LARGEST = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max


def acceptable_number(scale: float) -> bool:
    """Whether a number is positive, finite, and a normal number in FP32."""
    return _SMALLEST <= scale <= _LARGEST


def resolve(
    scale: Tensor | float | None,
    name: str = "k_scale",
    *,
    num_blocks: int,
    num_heads: int,
    page_size: int,
    device: torch.device,
    kind: str | None = None,
) -> Scale:
    """Check a scale against its cache and return it with its tensor's strides. This is the scale contract.

    Args:
        scale: None, a float, or FP32 of a shape in the table above, on the cache's device, any strides.
        name: the argument's name, for errors.
        num_blocks, num_heads, page_size: of the cache.
        device: the cache's device.
        kind: one of `KINDS`, or None to derive it from the shape (see `classify`).

    Returns:
        A `Scale`. Values are checked where this does not synchronize: floats always, per-tensor and per-head tensors on
        a CPU and outside torch.compile. `check_values` checks the others.

    Raises:
        TypeError: `scale` is not None, a float or an FP32 tensor.
        ValueError: the shape or the device is wrong, the strides reach past the tensor's storage, or a checked value
            is not finite and positive.
    """
    if isinstance(scale, Tensor):
        check_tensor(scale, name, dtypes=(torch.float32,), device=device)
    elif scale is not None:
        scale = check_positive(scale, name, "None, a float, or a tensor")
    scale_kind = classify(scale, name, num_blocks=num_blocks, num_heads=num_heads, page_size=page_size, kind=kind)
    if scale is None:
        return Scale("none", None)
    if not isinstance(scale, Tensor):
        return Scale(scale_kind, None, number=scale)
    resolved = Scale.of(scale_kind, scale)
    if scale.device.type == "cpu" and scale_kind in ("per-tensor", "per-head") and not torch.compiler.is_compiling():
        check_values(resolved, name)
    return resolved
