"""The first difference between two values, in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["first_difference"]


def first_difference(expected: Any, got: Any, *, tolerance: float = 0.0) -> str | None:
    """The first place at which `got` differs from `expected`, such as "answer[0][1]: expected 8, got 0".

    Args:
        expected: tensor (any shape and dtype), number, string, or a list, tuple or dict of these.
        got: the value to compare; a tuple may stand for a list, and a 0-d tensor for a number.
        tolerance: largest accepted difference of two floats, relative to the expected one (absolute below 1).

    Returns:
        The message, or None if the values are equal; NaN equals NaN.
    """
    return _difference(expected, got, "", tolerance)


def _at(path: str) -> str:
    """The beginning of a message: the indices that lead to the difference."""
    return f"answer{path}: " if path else ""


def _difference(expected: Any, got: Any, path: str, tolerance: float) -> str | None:
    if isinstance(expected, torch.Tensor):
        return _tensor_difference(expected, got, path, tolerance)
    if isinstance(expected, Mapping):
        return _mapping_difference(expected, got, path, tolerance)
    if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        return _sequence_difference(expected, got, path, tolerance)
    return _scalar_difference(expected, got, path, tolerance)


def _tensor_difference(expected: torch.Tensor, got: Any, path: str, tolerance: float) -> str | None:
    if not isinstance(got, torch.Tensor):
        return f"{_at(path)}expected a tensor of shape {list(expected.shape)}, got {_kind(got)}"
    if got.shape != expected.shape:
        return f"{_at(path)}expected shape {list(expected.shape)}, got {list(got.shape)}"
    if got.dtype != expected.dtype:
        return f"{_at(path)}expected dtype {expected.dtype}, got {got.dtype}"
    left, right = _comparable(expected), _comparable(got)
    same = (left == right) | (left.isnan() & right.isnan())
    if tolerance and expected.dtype.is_floating_point:
        same |= (left - right).abs() <= tolerance * left.abs().clamp(min=1.0)
    if bool(same.all()):
        return None
    index = [int(i) for i in (~same).nonzero()[0]]
    values = f"expected {_number(left[tuple(index)].item())}, got {_number(right[tuple(index)].item())}"
    return f"{_at(f'{path}{index}' if index else path)}{values} ({int((~same).sum())} of {same.numel()} differ)"


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """Float64 represents every value of the dtypes used here, FP8 included; integers stay int64."""
    tensor = tensor.detach().cpu()
    if tensor.dtype.is_floating_point and tensor.dtype != torch.float64:
        tensor = tensor.to(torch.float32)
    return tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor.to(torch.int64)


def _mapping_difference(expected: Mapping[Any, Any], got: Any, path: str, tolerance: float) -> str | None:
    if not isinstance(got, Mapping):
        return f"{_at(path)}expected a dict with the keys {list(expected)}, got {_kind(got)}"
    for key in expected:
        if key not in got:
            return f"{_at(path)}the key {key!r} is missing"
    for key in got:
        if key not in expected:
            return f"{_at(path)}the key {key!r} is unexpected"
    parts = (_difference(value, got[key], f"{path}[{key!r}]", tolerance) for key, value in expected.items())
    return next((part for part in parts if part is not None), None)


def _sequence_difference(expected: Sequence[Any], got: Any, path: str, tolerance: float) -> str | None:
    if isinstance(got, torch.Tensor) and got.dim():
        got = got.tolist()
    if not isinstance(got, Sequence) or isinstance(got, str | bytes):
        return f"{_at(path)}expected {len(expected)} values, got {_kind(got)}"
    for index, (left, right) in enumerate(zip(expected, got, strict=False)):
        part = _difference(left, right, f"{path}[{index}]", tolerance)
        if part is not None:
            return part
    if len(expected) != len(got):
        return f"{_at(path)}expected {len(expected)} values, got {len(got)}"
    return None


def _scalar_difference(expected: Any, got: Any, path: str, tolerance: float) -> str | None:
    plain = got.item() if hasattr(got, "item") and getattr(got, "size", None) is not None and _single(got) else got
    if isinstance(expected, str | bytes | bool) or expected is None:
        equal = type(plain) is type(expected) and plain == expected
    elif isinstance(plain, bool) or not isinstance(plain, int | float):
        return f"{_at(path)}expected {_number(expected)}, got {_kind(got)}"
    else:
        both_nan = math.isnan(expected) and math.isnan(plain)
        equal = both_nan or plain == expected or abs(plain - expected) <= tolerance * max(1.0, abs(expected))
    return None if equal else f"{_at(path)}expected {_number(expected)}, got {_number(plain)}"


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
