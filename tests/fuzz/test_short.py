"""A short run of the fuzzer, and whether it reaches every public function."""

from __future__ import annotations

import inspect

import fuzz
import pytest

import kvgather as kg
from tests.fuzz.calls import MAKERS, case_of
from tests.fuzz.case import Draw

CALLS = 500
EXCEPTIONS = {name for name in kg.__all__ if name.endswith("Error")}
CLASSES = ("BlockPool", "GatherPlan", "PagedKVCache", "PrefixBatch")
INSIDE = {
    "BlockPool.eviction_order",  # no arguments; every history compares it
    "GatherPlan.of_checked", "PagedKVCache.gather_for_attention", "PagedKVCache.write_again",  # of checked arguments
    *(f"PrefixBatch.{name}" for name in ("decided", "for_window", "held", "once", "plan_of", "recall")),
    *(f"PrefixBatch.{name}" for name in ("visible_lens", "visible_lens_on_host")),
}  # fmt: skip
"""Methods that other parts of the package call."""
DEVICE = {f"device.{name}" for name in ("doctor", "fp8_in_hardware", "fp8_support", "parse_device", "resolve_device")}


def public_functions() -> set[str]:
    """Every function and method of the public face."""
    methods = {
        f"{name}.{method}"
        for name in CLASSES
        for method, value in inspect.getmembers(getattr(kg, name))
        if not method.startswith("_") and inspect.isroutine(value)
    }
    functions = {name for name in kg.__all__ if name not in EXCEPTIONS and inspect.isroutine(getattr(kg, name))}
    return functions | (methods - INSIDE) | DEVICE


@pytest.mark.triton
def test_a_few_hundred_calls(capsys: pytest.CaptureFixture[str]) -> None:
    status = fuzz.main(["--calls", str(CALLS), "--seed", "0", "--limit", "120"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.splitlines()[-1].startswith(f"{CALLS} calls of seed 0 from 0 on, 0 bad, in ")


def test_every_public_function_is_called() -> None:
    called = {case_of(1, number).function.split(" ")[0] for number in range(3000)}
    assert public_functions() | {"BlockPool", "PagedKVCache", "lab.fence.fenced"} <= called
    assert len(public_functions()) > 25


def test_a_call_does_not_depend_on_the_others() -> None:
    alone = case_of(3, 17)
    for number in range(17):
        case_of(3, number)
    again = case_of(3, 17)
    assert (alone.lines, alone.args, alone.call) == (again.lines, again.args, again.call)
    assert case_of(4, 17).lines != alone.lines


def test_draws_are_those_of_the_seed_and_the_number() -> None:
    assert Draw(0, 1).random() == Draw(0, 1).random() != Draw(1, 1).random()
    assert sum(share for _, share in MAKERS) > 0
