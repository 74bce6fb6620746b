"""A guard tells tensors apart as the checks do, with torch's own compiled check and without it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgather.kernels.guards import guard, python_guard
from tests.where import GPU

FIXED, GROWS = torch.ones(4, 3), torch.ones(5, 2)
SIZES, STRIDES = [(4, 3), (None, 2)], [(3, 1), (2, 1)]

OTHERS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "the same": ((FIXED, GROWS), True),
    "alike": ((torch.zeros(4, 3), torch.zeros(5, 2)), True),
    "more rows": ((FIXED, torch.ones(9, 2)), True),
    "no rows": ((FIXED, torch.ones(0, 2)), True),
    "another size": ((torch.ones(5, 3), GROWS), False),
    "another inner size": ((FIXED, torch.ones(5, 3)), False),
    "another stride": ((torch.ones(3, 4).t(), GROWS), False),
    "another inner stride": ((FIXED, torch.ones(2, 5).t()), False),
    "another rank": ((FIXED, torch.ones(5, 2, 1)), False),
    "another dtype": ((FIXED, GROWS.double()), False),
    "a negative bit": ((FIXED, torch.view_as_complex(torch.ones(5, 2, 2)).conj().imag.contiguous()), True),
    "one unresolved": ((FIXED, torch.empty(5, 4, dtype=torch.complex64).conj().imag[:, ::2]), False),
    "meta": ((FIXED.to("meta"), GROWS), False),
    "a parameter": ((torch.nn.Parameter(FIXED, requires_grad=False), GROWS), False),
    "no tensor": ((FIXED, 3.0), False),
    "None": ((None, GROWS), False),
}


def guards() -> list[Any]:
    return [make([FIXED, GROWS], SIZES, STRIDES) for make in (guard, python_guard)]


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_alike(other: str) -> None:
    tensors, alike = OTHERS[other]
    assert [bool(check(*tensors)) for check in guards()] == [alike, alike]


def test_the_negative_bit_alone_is_a_difference() -> None:
    complex_rows = torch.view_as_complex(torch.ones(5, 2, 2))
    plain, negative = torch.view_as_real(complex_rows)[..., 1], complex_rows.conj().imag
    assert plain.stride() == negative.stride() and negative.is_neg()
    for make in (guard, python_guard):
        check = make([plain], [plain.shape], [plain.stride()])
        assert check(plain) and not check(negative)


def test_torch_has_the_check_that_is_asked() -> None:
    """Without it calls are right and slower; this says when a version of torch moved it."""
    assert guards()[0].__name__ == "torch_check" and guards()[1].__name__ == "check"


def test_a_nested_tensor_is_another_and_does_not_end_the_process() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
    for check in guards():
        assert check(FIXED, GROWS) and not check(nested, GROWS) and not check(FIXED, nested)


@pytest.mark.parametrize("where", [GPU])
def test_another_device(where: str) -> None:
    moved = FIXED.to(where), GROWS.to(where)
    assert not any(check(*moved) or check(FIXED, moved[1]) for check in guards())


def test_other_modes_are_other_guards_and_no_error() -> None:
    made = torch.ones(4, 3), torch.ones(5, 2)
    with torch.inference_mode():
        inside: Tensor = torch.ones(5, 2)
        for check in guards():
            assert check(made[0], inside) in (True, False)
