"""The scale contract: what a scale is, decided once, here, from its shape; and the strides it really has.

| kind | shape | strides the kernels use (block, head, slot) |
| --- | --- | --- |
| none | None | no scale is read |
| per-tensor | a float, or any tensor with one element | 0, 0, 0 |
| per-head | `[heads]` | 0, s0, 0 |
| per-page-head | `[blocks, heads]` | s0, s1, 0 |
| per-token-head | `[blocks, heads, page]` | s0, s1, s2 |

The crash this package is about was an address computed with strides that a one-element scale does not have. Nothing
else in the package looks at a scale's shape, so nothing else can get it wrong.
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
    """A scale that was checked against its cache.

    Attributes:
        kind: one of `KINDS`.
        tensor: FP32 on the cache's device, or None when there is no scale, or a number.
        number: a per-tensor scale that was given as a number: to put it into a tensor would be a launch.
        stride_block, stride_head, stride_slot: in elements; 0 along every axis the scale does not have.
    """

    kind: str
    tensor: Tensor | None
    stride_block: int = 0
    stride_head: int = 0
    stride_slot: int = 0
    number: float | None = None

    @classmethod
    def of(cls, kind: str, tensor: Tensor | None) -> Scale:
        """A scale known to be of `kind`, with the strides that its tensor has along that kind's axes."""
        axes = {"per-head": "h", "per-page-head": "bh", "per-token-head": "bhs"}.get(kind, "")
        strides = dict(zip(axes, tensor.stride(), strict=True)) if tensor is not None and axes else {}
        return cls(kind, tensor, strides.get("b", 0), strides.get("h", 0), strides.get("s", 0))

    def in_memory(self, device: torch.device) -> Scale:
        """The same scale with its number, if it is one, in a tensor of one element."""
        if self.number is None:
            return self
        return Scale(self.kind, torch.full((1,), self.number, dtype=torch.float32, device=device))

    def at(self, block: Tensor, head: Tensor, slot: Tensor) -> Tensor | None:
        """The scale of each (block, head, slot); index tensors that broadcast against each other, int64.

        Returns:
            FP32 with the shape the indices broadcast to along the axes that the scale has (1 along the others), or
            None when there is no scale.
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
        return self.tensor[block, head, slot]


def kind_shape(kind: str, num_blocks: int, num_heads: int, page_size: int) -> tuple[int, ...]:
    """The shape of a scale of a kind; `()` for per-tensor.

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
    """Say which kind a scale is.

    None is "none". A float, and any tensor with one element whatever its rank, is "per-tensor". Otherwise the rank
    decides, and the shape must be exactly that kind's. So a shape that two kinds share resolves the same way every
    time: with one head `[1]` is per-tensor, with one block and one head `[1, 1]` is too, and with page 1
    `[blocks, heads, 1]` is per-token-head. Where that is not what was meant, `kind` decides: the scale then has to
    have that kind's shape, and a one-element scale is refused as per-head in a cache with eight heads.

    Args:
        scale: the scale as given.
        name: the argument's name, for errors.
        num_blocks, num_heads, page_size: of the cache the scale belongs to.
        kind: one of `KINDS`, or None to read it off the shape.

    Raises:
        ValueError: the shape fits no kind, or not the kind that was asked for.
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
    given = f"shape {list(shape)}" if isinstance(scale, Tensor) else f"the value {scale}"
    options = {"per-tensor": "one element (per-tensor)"} | {k: str(list(s)) for k, s in shapes.items()}
    accepted = ", ".join(options.values()) if kind is None else options[kind]
    wanted_kind = "" if kind is None else f" as {kind}"
    raise ValueError(
        f"{name} has {given}; accepted for {num_heads} heads, {num_blocks} blocks, page {page_size}{wanted_kind}: "
        f"{accepted}{_pointer(shape, shapes, name) if isinstance(scale, Tensor) and kind is not None else ''}"
    )


def _pointer(shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]], name: str) -> str:
    """What to write where a scale has the shape of another kind than the one that was requested."""
    other = next((kind for kind, wanted in shapes.items() if shape == wanted), None)
    if other is None and math.prod(shape) == 1:
        other = "per-tensor"
    if other is None:
        return ""
    return f'; a scale of this shape is {other}: scale="{other}", or {name.replace("_scale", "")}_kind="{other}"'


def check_values(scale: Scale, name: str) -> None:
    """Raise unless every value of a scale is finite and positive; waits for the GPU if the scale is there.

    Raises:
        ValueError: a value is NaN, infinite, zero or negative; the message gives the first one and its index.
    """
    if scale.tensor is None or (scale.tensor.numel() == 1 and 0 < scale.tensor.item() < math.inf):
        return  # one number is looked at as a number: every call of a gather on a CPU looks
    good = torch.isfinite(scale.tensor) & (scale.tensor > 0)
    if not bool(good.all()):
        first = (~good).nonzero()[0].tolist()
        value = scale.tensor[tuple(first)].item()
        where = f" at {first}" if first else ""
        raise ValueError(f"{name} is {value}{where}; accepted: finite values above 0")


_SMALLEST, _LARGEST = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max


def acceptable_number(scale: float) -> bool:
    """Whether a number is positive and finite, and FP32 can hold it."""
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
    """Check a scale against its cache and give the strides that it really has. This is the contract.

    Args:
        scale: None, a float, or FP32 of a shape in the table above, on the cache's device, any strides.
        name: the argument's name, for errors.
        num_blocks, num_heads, page_size: of the cache.
        device: the cache's device.
        kind: one of `KINDS`, or None to read it off the shape (see `classify`).

    Returns:
        A `Scale`. Values are checked where that costs no wait: floats always,
        per-tensor and per-head tensors on a CPU and outside torch.compile; `check_values` checks the rest.

    Raises:
        TypeError: not None, a float or an FP32 tensor.
        ValueError: wrong shape or device, strides that leave the tensor, or a checked value that is not finite and
            positive.
    """
    if isinstance(scale, Tensor):
        check_tensor(scale, name, dtypes=(torch.float32,), device=device)
    elif scale is not None:
        scale = check_positive(scale, name, "None, a float, or a tensor")
    found = classify(scale, name, num_blocks=num_blocks, num_heads=num_heads, page_size=page_size, kind=kind)
    if scale is None:
        return Scale("none", None)
    if not isinstance(scale, Tensor):
        return Scale(found, None, number=scale)
    resolved = Scale.of(found, scale)
    if scale.device.type == "cpu" and found in ("per-tensor", "per-head") and not torch.compiler.is_compiling():
        check_values(resolved, name)
    return resolved
