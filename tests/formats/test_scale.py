"""The scale contract: every accepted shape with its kind and strides, and every rejected scale."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvgather.formats.scale import KINDS, Scale, check_values, classify, kind_shape, resolve

BLOCKS, HEADS, PAGE = 6, 8, 16
SIZES: dict[str, Any] = {"num_blocks": BLOCKS, "num_heads": HEADS, "page_size": PAGE}
CPU = torch.device("cpu")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def scale_id(value: object) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape)) + (str(list(value.stride())) if value.layout == torch.strided else "sparse")
    return value.__name__ if isinstance(value, type) else str(value)[:40]


def resolved(scale: object, kind: str | None = None, name: str = "k_scale", **sizes: int) -> Scale:
    return resolve(scale, name, device=CPU, kind=kind, **{**SIZES, **sizes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scale", "kind", "strides"),
    [
        (None, "none", (0, 0, 0)),
        (0.5, "per-tensor", (0, 0, 0)),
        (2, "per-tensor", (0, 0, 0)),
        (ones(), "per-tensor", (0, 0, 0)),
        (ones(1), "per-tensor", (0, 0, 0)),
        (ones(1, 1), "per-tensor", (0, 0, 0)),
        (ones(1, 1, 1, 1, 1), "per-tensor", (0, 0, 0)),
        (ones(3)[1:2], "per-tensor", (0, 0, 0)),
        (ones(HEADS), "per-head", (0, 1, 0)),
        (ones(HEADS * 3)[::3], "per-head", (0, 3, 0)),
        (ones(1).expand(HEADS), "per-head", (0, 0, 0)),
        (ones(BLOCKS, HEADS), "per-page-head", (8, 1, 0)),
        (ones(HEADS, BLOCKS).t(), "per-page-head", (1, 6, 0)),
        (ones(BLOCKS, 1).expand(BLOCKS, HEADS), "per-page-head", (1, 0, 0)),
        (ones(BLOCKS, HEADS, PAGE), "per-token-head", (128, 16, 1)),
        (ones(BLOCKS, PAGE, HEADS).transpose(1, 2), "per-token-head", (128, 1, 8)),
        (ones(BLOCKS, 2, HEADS, PAGE)[:, 1], "per-token-head", (256, 16, 1)),
        (ones().expand(BLOCKS, HEADS, PAGE), "per-token-head", (0, 0, 0)),
    ],
    ids=scale_id,
)
def test_every_accepted_shape(scale: Tensor | float | None, kind: str, strides: tuple[int, int, int]) -> None:
    got = resolved(scale)
    assert got.kind == kind
    assert (got.stride_block, got.stride_head, got.stride_slot) == strides
    if isinstance(scale, Tensor):
        assert got.tensor is scale  # nothing is copied
    assert resolved(scale, kind) == got or isinstance(scale, (float, int))


def test_a_float_stays_a_number_until_memory_is_needed() -> None:
    got = resolved(0.25)
    assert (got.kind, got.tensor, got.number) == ("per-tensor", None, 0.25)
    assert got.in_memory(CPU).number is None and resolved(ones(1)).in_memory(CPU).tensor is not None
    got = got.in_memory(CPU)
    assert got.tensor is not None
    assert (got.tensor.tolist(), got.tensor.dtype, got.tensor.device) == ([0.25], torch.float32, CPU)


def test_the_error_names_the_shape_and_the_accepted_shapes() -> None:
    with pytest.raises(ValueError) as info:
        resolved(ones(7), num_blocks=1024)
    assert str(info.value) == (
        "k_scale has shape [7]; accepted for 8 heads, 1024 blocks, page 16: one element (per-tensor), [8], [1024, 8], "
        "[1024, 8, 16]"
    )


@pytest.mark.parametrize(
    "shape",
    [
        (0,), (7,), (9,), (BLOCKS,), (PAGE,), (1, HEADS), (HEADS, 1), (HEADS, BLOCKS), (BLOCKS, HEADS, 1),
        (BLOCKS, 1, PAGE), (1, HEADS, PAGE), (BLOCKS, PAGE, HEADS), (BLOCKS, HEADS, PAGE, 1), (BLOCKS * HEADS,),
        (BLOCKS - 1, HEADS, PAGE), (BLOCKS + 1, HEADS), (BLOCKS, HEADS, PAGE + 1),
    ],
)  # fmt: skip
def test_every_other_shape_is_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^v_scale has shape \[.*\]; accepted for 8 heads, 6 blocks, page 16: one el"):
        resolved(ones(*shape), name="v_scale")


@pytest.mark.parametrize(
    ("sizes", "shape", "kind"),
    [
        ({"num_heads": 1}, (1,), "per-tensor"),
        ({"num_heads": 1, "num_blocks": 1}, (1, 1), "per-tensor"),
        ({"num_heads": 1, "num_blocks": 1, "page_size": 1}, (1, 1, 1), "per-tensor"),
        ({"num_heads": 1}, (BLOCKS, 1), "per-page-head"),
        ({"num_blocks": 1}, (1, HEADS), "per-page-head"),
        ({"num_blocks": 1}, (HEADS,), "per-head"),
        ({"num_blocks": HEADS}, (HEADS,), "per-head"),
        ({"num_blocks": HEADS}, (HEADS, HEADS), "per-page-head"),
        ({"page_size": 1}, (BLOCKS, HEADS, 1), "per-token-head"),
        ({"page_size": 1, "num_heads": 1}, (BLOCKS, 1, 1), "per-token-head"),
        ({"num_blocks": 1, "num_heads": 1}, (1, 1, PAGE), "per-token-head"),
    ],
)
def test_an_ambiguous_shape_has_one_kind(sizes: dict[str, int], shape: tuple[int, ...], kind: str) -> None:
    assert resolved(ones(*shape), **sizes).kind == kind


@pytest.mark.parametrize(
    ("sizes", "shape", "kind"),
    [
        ({"num_heads": 1}, (1,), "per-head"),
        ({"num_heads": 1, "num_blocks": 1}, (1, 1), "per-page-head"),
        ({"num_heads": 1, "num_blocks": 1, "page_size": 1}, (1, 1, 1), "per-token-head"),
    ],
)
def test_a_kind_selects_among_ambiguous_shapes(sizes: dict[str, int], shape: tuple[int, ...], kind: str) -> None:
    assert resolved(ones(*shape), kind, **sizes).kind == kind
    assert resolved(ones(*shape), "per-tensor", **sizes).kind == "per-tensor"


@pytest.mark.parametrize(
    ("scale", "kind", "message"),
    [
        (ones(1), "per-head", r"k_scale has shape \[1\]; accepted for 8 heads, 6 blocks, page 16 as per-head: \[8\];"),
        (ones(1), "per-head", r'; a scale of this shape is per-tensor: scale="per-tensor", or k_kind="per-tensor"$'),
        (0.5, "per-head", r"k_scale has the value 0.5; accepted .* as per-head: \[8\]$"),
        (ones(HEADS), "per-tensor", r"accepted .* as per-tensor: one element \(per-tensor\);"),
        (ones(HEADS), "per-tensor", r'; a scale of this shape is per-head: scale="per-head", or k_kind="per-head"$'),
        (ones(HEADS), "per-token-head", r"accepted .* as per-token-head: \[6, 8, 16\];"),
        (ones(HEADS + 1), "per-tensor", r"accepted .* as per-tensor: one element \(per-tensor\)$"),
        (ones(HEADS), "none", r"k_scale was given; accepted for kind none: None"),
        (None, "per-head", r"k_scale is None; accepted for kind per-head: a scale"),
        (
            ones(1),
            "per-block",
            r"k_kind is 'per-block'; accepted: none, per-tensor, per-head, per-page-head, per-token",
        ),
    ],
)
def test_a_scale_that_does_not_match_its_kind_is_rejected(
    scale: Tensor | float | None, kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(scale, kind)


def short(scale: Tensor) -> Tensor:
    """A scale whose storage is one element too short."""
    scale.untyped_storage().resize_(scale.untyped_storage().nbytes() - 4)
    return scale


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (ones(HEADS).double(), TypeError, r"k_scale has dtype float64; accepted: float32"),
        (ones(1).bfloat16(), TypeError, r"k_scale has dtype bfloat16; accepted: float32"),
        (torch.ones(1, dtype=torch.int32), TypeError, r"k_scale has dtype int32"),
        ("0.5", TypeError, r"k_scale is str '0.5'; accepted: None, a float, or a tensor"),
        ([0.5], TypeError, r"k_scale is list \[0.5\]; accepted"),
        (True, TypeError, r"k_scale is bool True; accepted"),
        (0.5j, TypeError, r"k_scale is complex"),
        (ones(HEADS).to("meta"), ValueError, r"k_scale is on meta; accepted: cpu"),
        (ones(HEADS).to_sparse(), ValueError, r"k_scale has layout torch.sparse_coo; accepted"),
        (short(ones(1)), ValueError, r"k_scale with shape \[1\], .* reaches byte 4 of its memory, which has 0"),
        (short(ones(HEADS)), ValueError, r"k_scale with shape \[8\], .* reaches byte 32 of its memory, which has 28"),
        (short(ones(BLOCKS, HEADS, PAGE)), ValueError, r"accepted: strides that stay inside the tensor's memory"),
        (short(ones(9)[1:]), ValueError, r"offset 1 reaches byte 36 of its memory, which has 32"),
    ],
    ids=scale_id,
)
def test_invalid_scales_are_rejected(scale: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolved(scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0])
def test_values_that_are_not_finite_and_positive_are_rejected(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"k_scale is {bad}; accepted: finite values above 0"):
        resolved(bad)
    with pytest.raises(ValueError, match=rf"k_scale is {bad}.*; accepted: finite values above 0"):
        resolved(torch.tensor([bad]))
    scale = ones(HEADS)
    scale[5] = bad
    with pytest.raises(ValueError, match=rf"k_scale is {bad} at \[5\]; accepted: finite values above 0"):
        resolved(scale)
    pages = ones(BLOCKS, HEADS, PAGE)
    pages[2, 1, 3] = bad
    with pytest.raises(ValueError, match=rf"k_scale is {bad} at \[2, 1, 3\]; accepted"):
        check_values(resolved(pages), "k_scale")  # values of larger scales are checked on request


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)], ids=repr)
def test_numbers_of_other_types_are_accepted(number: float) -> None:
    assert resolved(number).in_memory(CPU).tensor.tolist() == [0.5]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.float32("nan"), ValueError, "k_scale is nan; accepted: finite values above 0"),
        (np.int64(-3), ValueError, "k_scale is -3; accepted: finite values above 0"),
        (10**5000, ValueError, "k_scale is of too many digits to print; accepted: finite values above 0"),
        (np.float64(1e300), ValueError, r"k_scale is 1e\+300; accepted: values that FP32 can hold"),
        (np.bool_(True), TypeError, "k_scale is bool .*True.*; accepted: None, a float, or a tensor"),
        (np.array([0.5]), TypeError, r"k_scale is ndarray array\(\[0.5\]\); accepted: None, a float, or a tensor"),
    ],
    ids=["nan", "negative", "digits", "1e300", "bool", "array"],
)
def test_invalid_numbers_are_rejected(bad: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolved(bad)


@pytest.mark.parametrize("bad", [1e-60, 1e300, 1e-40])
def test_floats_that_fp32_cannot_represent_are_rejected(bad: float) -> None:
    with pytest.raises(ValueError, match=r"k_scale is .*; accepted: values that FP32 can hold"):
        resolved(bad)


def test_every_kind_has_one_shape() -> None:
    assert [kind_shape(kind, BLOCKS, HEADS, PAGE) for kind in KINDS[1:]] == [(), (8,), (6, 8), (6, 8, 16)]
    with pytest.raises(ValueError, match=r"kind is 'none'; accepted: per-tensor"):
        kind_shape("none", BLOCKS, HEADS, PAGE)


def test_the_kinds_of_an_empty_pool() -> None:
    sizes = {"num_blocks": 0, "num_heads": HEADS, "page_size": PAGE}
    assert classify(ones(0, HEADS), "k_scale", **sizes) == "per-page-head"
    assert classify(ones(0, HEADS, PAGE), "k_scale", **sizes) == "per-token-head"
    with pytest.raises(ValueError, match=r"k_scale has shape \[0\]"):
        classify(ones(0), "k_scale", **sizes)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_at_reads_the_scale_of_each_position(kind: str) -> None:
    shape = kind_shape(kind, BLOCKS, HEADS, PAGE) or (1,)
    tensor = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32).view(shape)
    scale = resolved(tensor, kind)
    block, head, slot = torch.tensor([4, 0]), torch.tensor([7, 3]), torch.tensor([15, 1])
    got = scale.at(block, head, slot)
    assert got is not None
    flat = [
        block * scale.stride_block + head * scale.stride_head + slot * scale.stride_slot + 1
        for block, head, slot in ((4, 7, 15), (0, 3, 1))
    ]
    assert got.expand(2).tolist() == flat


def test_at_of_kind_none_is_none() -> None:
    assert resolved(None).at(torch.tensor(0), torch.tensor(0), torch.tensor(0)) is None
