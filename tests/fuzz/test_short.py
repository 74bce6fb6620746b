"""A short run of the fuzzer, and whether it reaches every public function."""

from __future__ import annotations

import fuzz
import pytest

import kvgather as kg
from tests.fuzz.calls import MAKERS, case_of
from tests.fuzz.case import Draw

CALLS = 500
EXCEPTIONS = {name for name in kg.__all__ if name.endswith("Error")}
METHODS = {
    "BlockPool": ("allocate", "append", "block", "block_table", "commit", "free", "reset", "slots", "withdraw"),
    "GatherPlan": ("build", "check"),
    "PagedKVCache": ("check", "from_tensors", "gather", "write"),
    "PrefixBatch": ("build", "check", "explain", "prepare"),
    "device": ("doctor", "fp8_in_hardware", "fp8_support", "parse_device", "resolve_device"),
}


@pytest.mark.triton
def test_a_few_hundred_calls(capsys: pytest.CaptureFixture[str]) -> None:
    status = fuzz.main(["--calls", str(CALLS), "--seed", "0", "--limit", "120"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.splitlines()[-1].startswith(f"{CALLS} calls of seed 0 from 0 on, 0 bad, in ")


def test_every_public_function_is_called() -> None:
    called = {case_of(1, number).function.split(" ")[0] for number in range(3000)}
    functions = {name for name in kg.__all__ if name not in EXCEPTIONS | set(METHODS)}
    wanted = functions | {f"{name}.{method}" for name, methods in METHODS.items() for method in methods}
    assert wanted | {"BlockPool", "PagedKVCache", "lab.fence.fenced"} <= called


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
