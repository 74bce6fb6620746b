"""Mistakes of a reader become messages: exceptions, loops without an end, answers of a wrong kind, places."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kvgather.workbook import checks

pytestmark = pytest.mark.triton
hunt = pytest.importorskip("kvgather.lab.hunt", reason="needs Triton, which has no build for this machine")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from kvgather.lab.hunt import deadline as deadlines  # noqa: E402
from kvgather.lab.hunt import handed_in, judge, place  # noqa: E402
from kvgather.lab.hunt.deadline import OutOfTime, deadline  # noqa: E402
from kvgather.lab.hunt.differences import Contents, difference  # noqa: E402
from kvgather.lab.hunt.kernels import rows  # noqa: E402

SLOTS = hunt.BUGS["slots"]
may_be_dropped = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
"""The deadline's exception may arrive in a callback of the garbage collector, which drops it; then it comes again."""


@triton.jit
def endless_kernel(slots_ptr, positions_ptr, table_ptr, n, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    at = 0
    while at < n:
        tl.store(slots_ptr, tl.load(positions_ptr))


@triton.jit
def raising_kernel(slots_ptr, positions_ptr, table_ptr, n, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(slots_ptr, missing)  # noqa: F821


@triton.jit
def idle_kernel(slots_ptr, positions_ptr, table_ptr, n, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    pass


@triton.jit
def greedy_kernel(slots_ptr, positions_ptr, table_ptr, n, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < n
    position = tl.load(positions_ptr + token, mask=inside, other=0)
    block = tl.load(table_ptr + position // PAGE, mask=inside, other=0)
    tl.store(slots_ptr + token, block * PAGE + position % PAGE, mask=inside)
    tl.store(slots_ptr, tl.load(slots_ptr))


@may_be_dropped
def test_a_loop_without_an_end_is_stopped() -> None:
    began = time.monotonic()
    said = judge.complaint(SLOTS, {"n": 8}, endless_kernel, seconds=0.5)
    assert said == "n = 8: no result after 0.5 s; does a loop never end?"
    assert time.monotonic() - began < 30
    assert judge.complaint(SLOTS, {"n": 8}) is None, "the interpreter works as before"


def test_an_exception_of_a_kernel_reaches_the_caller() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="missing"):
        judge.complaint(SLOTS, {"n": 8}, raising_kernel)
    assert judge.complaint(SLOTS, {"n": 8}) is None


def test_a_launcher_has_to_launch() -> None:
    def torch_alone(slots: Any, positions: Any, table: Any, page_size: int) -> None:
        slots.copy_(SLOTS.module.oracle(slots, positions, table, page_size)["slots"])

    assert judge.complaint(SLOTS, SLOTS.shows, torch_alone) == "n = 21: no kernel was launched"
    assert judge.complaint(SLOTS, SLOTS.shows, idle_kernel) == "n = 21: slots[0]: expected 0, got -1 (21 of 21 differ)"


def test_right_contents_with_two_writers_are_wrong() -> None:
    said = judge.complaint(SLOTS, {"n": 21}, greedy_kernel)
    assert said is not None and "store slots_ptr, element 0 of 21, stored by" in said


def test_fresh_memory_is_poisoned_and_the_mode_restored() -> None:
    before = torch.get_deterministic_debug_mode()
    seen: list[Any] = []
    judge.traced(lambda: seen.extend((torch.empty(3), torch.empty(2, dtype=torch.int32))))
    assert seen[0].isnan().all() and (seen[1] == torch.iinfo(torch.int32).max).all()
    assert torch.get_deterministic_debug_mode() == before


@pytest.mark.parametrize("bug", hunt.BUGS.values(), ids=lambda bug: bug.name)
def test_the_bug_passes_and_shows_as_the_registry_says(bug: Any) -> None:
    for geometry in (bug.shows, *bug.also):
        assert judge.complaint(bug, geometry) is not None
    results = []
    for geometry in bug.passes:
        inputs = bug.inputs(geometry)
        expected = bug.expected(inputs)
        judge.traced(lambda bug=bug, inputs=inputs: bug.run(inputs))
        results += [difference(tensor, inputs[name], name, bug.tolerance) for name, tensor in expected.items()]
    assert results and set(results) == {None}


@may_be_dropped
def test_a_deadline_ends_before_later_code() -> None:
    for _ in range(20):
        with deadline(30.0):
            pass
    with pytest.raises(OutOfTime), deadline(0.05):
        while True:
            pass


def test_a_deadline_comes_again_where_python_dropped_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does what is raised in a callback of the garbage collector; hypothesis has one."""
    monkeypatch.setattr(deadlines, "AGAIN", 0.05)
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Garbage:
        def __del__(self) -> None:
            while not given_up:  # until it is interrupted
                time.sleep(0.001)

    given_up: list[int] = []
    timer = threading.Timer(60.0, given_up.append, [1])
    timer.start()
    with pytest.raises(OutOfTime), deadline(0.05):
        Garbage()
        while not given_up:
            pass
    timer.cancel()
    assert [type(each.exc_value) for each in dropped] == [OutOfTime]
    for thread in [thread for thread in threading.enumerate() if thread.name == "kvgather deadline"]:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "fixed is None"),
        ("slots_kernel", "fixed is 'slots_kernel'"),
        ((idle_kernel, idle_kernel), "fixed has 2 kernels"),
        (idle_kernel.fn, "idle_kernel has pointers as arguments and no @triton.jit"),
    ],
)
def test_answers_of_a_wrong_kind(answer: Any, said: str) -> None:
    with pytest.raises(handed_in.WrongKind, match=said):
        handed_in.as_functions(SLOTS, answer)


@pytest.mark.parametrize("bug", hunt.BUGS.values(), ids=lambda bug: bug.name)
def test_every_right_place_is_accepted(bug: Any) -> None:
    numbers = {text.partition("  #")[0].strip(): number for number, text in place.lines_of(bug).items()}
    for argument in bug.arguments:
        for line in bug.lines:
            for program in bug.programs:
                for way in (line, f"    {line}  # a comment", line.replace(" ", ""), numbers[line]):
                    assert place.place_complaint(bug, argument, way, program) is None
    if len(bug.programs[0]) == 1:
        assert place.place_complaint(bug, bug.arguments[0], bug.lines[0], bug.programs[0][0]) is None
    assert all(len(hint) > 20 for hint in bug.hints) and len(bug.hints) == 3


def test_the_line_of_a_launcher() -> None:
    """Where a launcher passes too little, naming its line gets a reason; other lines of the launcher are unknown."""
    bug = hunt.BUGS["pages"]
    source, first = inspect.getsourcelines(bug.module.copy_pages)
    (launch,) = (first + i for i, text in enumerate(source) if "kernel[" in text)

    def said(line: Any, of: Any = bug) -> str | None:
        return place.place_complaint(of, of.arguments[0], line, of.programs[0])

    whole = "pages_kernel[(len(table),)](out, k, table, k.stride(1), PAGE=page_size, DIM=dim)"
    for line in (whole, f"    {whole}  # too little", "k.stride(1)", launch):
        assert said(line) == "line: the launcher passes too little; name the line of the kernel that relies on it"
    assert said("_, page_size, dim = k.shape") == (
        "line: no line of the kernel as it was contains '_, page_size, dim = k.shape'"
    )
    assert said(first) == f"line is {first}; the kernels have the lines 13 to 20 of pages.py"
    scales = hunt.BUGS["scales"]
    assert said("scales_kernel[(len(table), heads)]", scales) == (
        "line: no line of the kernel as it was contains 'scales_kernel[(len(table), heads)]'"
    )


def test_a_place_that_is_still_open(capsys: pytest.CaptureFixture[str]) -> None:
    checks.check("11.1", ("positions_ptr", ..., (2,)), idle_kernel)
    checks.check("11.1", 7, idle_kernel)
    assert capsys.readouterr().out == "not yet: line is still open\nwrong: expected (argument, line, program), got 7\n"


def test_a_machine_without_room_for_the_large_pool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bug = hunt.BUGS["rows"]

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(rows.mmap, "mmap", refuse)
    with pytest.raises(rows.NoRoom, match=r"maps no 4,348,444,704 bytes of addresses"):
        bug.inputs()
    right = (bug.arguments[0], bug.lines[0], bug.programs[0])
    checks.check("11.7", right, lambda out, pool, table: None)
    assert capsys.readouterr().out.startswith("not yet: this machine maps no ")


def test_the_large_pool_takes_few_pages() -> None:
    """Resident memory, as the operating system counts it, grows by less than 64 MB."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc, which only Linux has")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    inputs = hunt.BUGS["rows"].inputs({"table": [3, 4099], "blocks": 4200})
    assert judge.complaint(hunt.BUGS["rows"], {"table": [3, 2047], "blocks": 2100}) is None
    assert resident() - before < 64e6 and inputs["pool"].untyped_storage().nbytes() > 4e9


def test_contents_see_memory_between_the_elements() -> None:
    pool = torch.zeros(4, 2)
    before = Contents({"view": pool[:, 0], "number": 3})
    assert before.changed() == []
    pool[1, 1] = 1.0
    assert before.changed() == ["view"]
