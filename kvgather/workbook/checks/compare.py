"""The first difference between two values, said in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["first_difference"]


def first_difference(expected: Any, got: Any, *, tolerance: float = 0.0) -> str | None:
    """Say where `got` first differs from `expected`, or return None when it does not; NaN equals NaN.

    Args:
        expected: tensor (any shape and dtype), number, string, or a list, tuple or dict of these.
        got: what to compare with it; a list may be a tuple, and a number may be a 0-d tensor.
        tolerance: largest accepted difference of two floats, relative to the expected one (absolute below 1).
    """
    return _difference(expected, got, "", tolerance)


def _difference(expected: Any, got: Any, where: str, tolerance: float) -> str | None:
    if isinstance(expected, torch.Tensor):
        return _tensor_difference(expected, got, where, tolerance)
    if isinstance(expected, Mapping):
        return _mapping_difference(expected, got, where, tolerance)
    if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        return _sequence_difference(expected, got, where, tolerance)
    return _scalar_difference(expected, got, where, tolerance)


def _tensor_difference(expected: torch.Tensor, got: Any, where: str, tolerance: float) -> str | None:
    if not isinstance(got, torch.Tensor):
        return f"{where}expected a tensor of shape {list(expected.shape)}, got {_kind(got)}"
    if got.shape != expected.shape:
        return f"{where}expected shape {list(expected.shape)}, got {list(got.shape)}"
    if got.dtype != expected.dtype:
        return f"{where}expected dtype {expected.dtype}, got {got.dtype}"
    left, right = _comparable(expected), _comparable(got)
    same = (left == right) | (left.isnan() & right.isnan())
    if tolerance and expected.dtype.is_floating_point:
        same |= (left - right).abs() <= tolerance * left.abs().clamp(min=1.0)
    if bool(same.all()):
        return None
    index = [int(i) for i in (~same).nonzero()[0]]
    values = f"expected {_number(left[tuple(index)].item())}, got {_number(right[tuple(index)].item())}"
    place = f"the first difference is at index {index}: " if index else ""
    return f"{where}{place}{values} ({int((~same).sum())} of {same.numel()} differ)"


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """Float64 holds every value of the dtypes used here, FP8 included, except integers above 2^53."""
    tensor = tensor.detach().cpu()
    if tensor.dtype.is_floating_point and tensor.dtype != torch.float64:
        tensor = tensor.to(torch.float32)
    return tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor.to(torch.int64)


def _mapping_difference(expected: Mapping[Any, Any], got: Any, where: str, tolerance: float) -> str | None:
    if not isinstance(got, Mapping):
        return f"{where}expected a dict with the keys {list(expected)}, got {_kind(got)}"
    for key in expected:
        if key not in got:
            return f"{where}the key {key!r} is missing"
    for key in got:
        if key not in expected:
            return f"{where}the key {key!r} is one too many"
    parts = (_difference(value, got[key], f"{where}at key {key!r}: ", tolerance) for key, value in expected.items())
    return next((part for part in parts if part is not None), None)


def _sequence_difference(expected: Sequence[Any], got: Any, where: str, tolerance: float) -> str | None:
    if isinstance(got, torch.Tensor) and got.dim():
        got = got.tolist()
    if not isinstance(got, Sequence) or isinstance(got, str | bytes):
        return f"{where}expected {len(expected)} values, got {_kind(got)}"
    for index, (left, right) in enumerate(zip(expected, got, strict=False)):
        part = _difference(left, right, f"{where}at index {index}: ", tolerance)
        if part is not None:
            return part
    if len(expected) != len(got):
        return f"{where}expected {len(expected)} values, got {len(got)}"
    return None


def _scalar_difference(expected: Any, got: Any, where: str, tolerance: float) -> str | None:
    plain = got.item() if hasattr(got, "item") and getattr(got, "size", None) is not None and _single(got) else got
    if isinstance(expected, str | bytes | bool) or expected is None:
        equal = type(plain) is type(expected) and plain == expected
    elif isinstance(plain, bool) or not isinstance(plain, int | float):
        return f"{where}expected {_number(expected)}, got {_kind(got)}"
    else:
        both_nan = math.isnan(expected) and math.isnan(plain)
        equal = both_nan or plain == expected or abs(plain - expected) <= tolerance * max(1.0, abs(expected))
    return None if equal else f"{where}expected {_number(expected)}, got {_number(plain)}"


def _single(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else value.size == 1


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" + (
        f", {text}" if len(text) <= 40 and " at 0x" not in text else ""
    )
