"""Signatures: equal for tensors that pass the same checks and fit the same compiled kernel, and for no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvgather.kernels.signatures import inside, offset_lanes, row_reach, signature


def aligned(n: int, past: int = 0) -> Tensor:
    """n FP32 elements at an address `past` elements beyond a multiple of 16 bytes."""
    memory = torch.zeros(n + 8)
    first = -(memory.data_ptr() // 4) % 4
    return memory[first + past : first + past + n]


def test_another_tensor_of_the_same_kind_has_the_same_signature() -> None:
    one, other = torch.zeros(12).view(3, 4), torch.ones(12).view(3, 4)
    assert signature(one) == signature(other) and hash(signature(one)) == hash(signature(other))


def test_what_tells_tensors_apart() -> None:
    base = torch.zeros(24)
    others = {
        "the base": base.view(4, 6),
        "its shape": base.view(6, 4),
        "its strides": base.view(6, 4).t(),
        "its dtype": torch.zeros(24, dtype=torch.int32).view(4, 6),
        "its device": torch.zeros(4, 6, device="meta"),
        "its type": torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False),
        "its memory": torch.zeros(28)[:24].view(4, 6),
        "where it begins": torch.zeros(28)[4:].view(4, 6),
        "a negative bit": torch.zeros(4, 6, dtype=torch.complex64).conj().imag,
    }
    told = {name: signature(tensor) for name, tensor in others.items()}
    assert len(set(told.values())) == len(told)
    assert len({signature(aligned(4, past))[5] for past in range(4)}) == 4, "addresses modulo 16 bytes"


@pytest.mark.parametrize(("last", "fits"), [(-1, True), (0, True), (3, True), (4, False)])
def test_whether_an_element_is_inside_the_memory(last: int, fits: bool) -> None:
    assert inside(torch.zeros(6)[2:], last) is fits
    assert inside(torch.zeros(6, dtype=torch.float16)[2:], last) is fits


def test_the_reach_of_a_row_by_hand() -> None:
    assert row_reach(torch.zeros(5, 3, 4)) == 12
    assert row_reach(torch.zeros(5, 6, 8)[:, ::2, ::4]) == 1 + 2 * 16 + 1 * 4
    assert row_reach(torch.zeros(5)) == 1


def test_one_warp_holds_31_sequences() -> None:
    assert [offset_lanes(batch) for batch in (0, 1, 31, 32, 1000)] == [32, 32, 32, 256, 256]
