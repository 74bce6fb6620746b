"""What a trace reports besides elements outside: groups, races, unwritten memory, and what differs from a GPU."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import kvgather
from kvgather.lab.access import describe_source
from kvgather.lab.groups import runs
from kvgather.lab.trace import InterpreterWarning, Trace, TraceError, trace

pytestmark = pytest.mark.triton
if kvgather.device.triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def two(x, k_scale, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n, other=0)
        scale = tl.load(k_scale + i)
        tl.store(out + i, value * scale)

    @triton.jit
    def copy_kernel(x, out, stride_x, offset, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i * stride_x + offset, mask=i < n, other=-1), mask=i < n)

    @triton.jit
    def overlap_kernel(out, step, BLOCK: tl.constexpr):
        i = tl.program_id(0) * step + tl.arange(0, BLOCK)
        tl.store(out + i, i)

    @triton.jit
    def two_stores_kernel(a, b):
        program = tl.program_id(0)
        if program == 0:
            tl.store(a + tl.arange(0, 4), tl.arange(0, 4))
        else:
            tl.store(b + tl.arange(0, 2), tl.arange(0, 2))

    @triton.jit
    def count_kernel(out, seen):
        tl.atomic_add(out, 1)
        tl.store(seen + tl.program_id(0) * 0, 1, mask=tl.program_id(0) == 0)

    @triton.jit
    def indirect_kernel(pointers, out):
        pointer = tl.load(pointers + tl.program_id(0)).to(tl.pointer_type(tl.float32))
        tl.store(out + tl.program_id(0), tl.load(pointer))

    @triton.jit
    def concat_kernel(a, b, out, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(tl.where(i < n, a + i, b + i - n)))

    @triton.jit
    def dot_kernel(a, b, out, N: tl.constexpr):
        i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(out + i, tl.dot(tl.load(a + i), tl.load(b + i)))

    @triton.jit
    def bytes_kernel(codes, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, i)

    def keep_large(configs, named_args, **kwargs):
        return [config for config in configs if config.kwargs["BLOCK"] >= named_args["least"]]

    def tuned_kernel(x, out, n, least, BLOCK: tl.constexpr, HALF: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i, mask=i < n) + HALF, mask=i < n)

    CONFIGS = [triton.Config({"BLOCK": block}, num_warps=2) for block in (4, 8, 16)]
    tuned = triton.autotune(CONFIGS, key=["n"], prune_configs_by={"early_config_prune": keep_large})(
        triton.heuristics({"HALF": lambda args: args["BLOCK"] // 2})(triton.jit(tuned_kernel))
    )


HERE = Path(__file__)


def line_of(text: str) -> int:
    return 1 + next(i for i, line in enumerate(HERE.read_text().splitlines()) if text in line)


def where(text: str, kernel: str) -> str:
    return f"{HERE.name}:{line_of(text)} in {kernel}()"


def test_the_issues_line() -> None:
    x = torch.ones(64)
    with trace() as t:
        two[(1,)](x, torch.ones(1), torch.zeros(64), 64, BLOCK=64)
    wanted = where("scale = tl.load(k_scale + i)", "two")
    assert t.report() == f"{wanted}: load k_scale, elements 1–63 of 1, first program (0,)"
    assert str(t.violations[0]) == f"{wanted}: load k_scale, element 1 of 1, program (0,)"
    assert len(t.violations) == 63 and str(t.groups[0]) == t.report()


def test_one_violation_cannot_hide_another() -> None:
    with trace() as t:
        for _ in range(3):
            two[(40,)](torch.ones(80), torch.ones(1), torch.zeros(79), 80, BLOCK=2)
    lines = t.report(limit=2).splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines] == ["load k_scale", "store out"]
    assert lines[0].endswith("elements 1–79 of 1, first program (0,) of launch 0, in 3 launches")
    assert lines[1].endswith("store out, element 79 of 79, first program (39,) of launch 0, in 3 launches")
    assert t.report(limit=1).splitlines()[1:] == ["and 1 more"]
    assert [(g.argument, g.launch, g.kind, g.reason) for g in t.groups] == [
        (name, launch, kind, "outside") for launch in range(3) for name, kind in (("k_scale", "load"), ("out", "store"))
    ]
    first = t.groups[0]
    assert (first.kernel, first.file, first.size, len(first.programs), len(first.elements)) == (
        "two", str(HERE), 1, 40, 79,
    )  # fmt: skip


def test_gaps_of_a_view_are_checked_unless_strict_is_false() -> None:
    base, out = torch.arange(12.0), torch.zeros(9)
    with trace() as t:
        copy_kernel[(1,)](base[:10:2], out, 1, 0, 9, BLOCK=16)
    assert out.tolist() == list(range(9))  # as in a run without a trace
    wanted = "load x, elements 1, 3, 5 and 7 of 9, between the view's elements, first program (0,)"
    assert t.report() == f"{where('tl.store(out + i, tl.load(x + i * stride_x', 'copy_kernel')}: {wanted}"
    assert str(t.violations[0]).endswith("element 1 of 9, between the view's elements, program (0,)")
    with trace(strict=False) as t:
        copy_kernel[(1,)](base[:10:2], out, 1, 0, 9, BLOCK=16)
    assert t.report() == "no access outside its tensor; accesses: 2, launches: 1"


def test_between_and_behind_are_two_lines() -> None:
    with trace() as t:
        copy_kernel[(1,)](torch.arange(12.0)[:6:2], torch.zeros(8), 1, 0, 8, BLOCK=8)
    lines = [line.split(", first")[0].split(": ")[1] for line in t.report().splitlines()]
    assert lines == ["load x, elements 5–7 of 5", "load x, elements 1 and 3 of 5, between the view's elements"]
    assert [g.reason for g in t.groups] == ["outside", "between"]


def test_an_access_in_the_storage_is_executed_and_one_outside_is_skipped() -> None:
    arena, out = torch.arange(8.0), torch.zeros(6)
    with trace() as t:
        copy_kernel[(1,)](arena[2:4], out, 1, -4, 6, BLOCK=8)
    assert out.tolist() == [0, 0, 0, 1, 2, 3]  # two elements before the storage are skipped
    assert {v.element for v in t.violations} == {-4, -3, -2, -1}
    with trace() as t:
        copy_kernel[(1,)](torch.arange(8.0), arena[2:4], 1, 0, 4, BLOCK=8)
    assert arena.tolist() == [0, 1, 0, 1, 2, 3, 6, 7] and {v.element for v in t.violations} == {2, 3}


@pytest.mark.parametrize(
    ("elements", "text"),
    [
        ([7], "element 7"),
        ([0, 1], "elements 0–1"),
        ([0, 1, 2, 5], "elements 0–2 and 5"),
        ([-8, -7, 3], "elements -8 to -7 and 3"),
        ([1, 3, 5, 7], "elements 1, 3, 5 and 7"),
        ([1, 3, 5, 7, 9, 10], "elements 1, 3, 5, …, 9–10 (6 elements)"),
    ],
)
def test_runs_of_elements(elements: list[int], text: str) -> None:
    assert runs(np.array(elements)) == text


def test_the_file_of_a_cell_has_no_name() -> None:
    assert describe_source("/tmp/ipykernel_123/4567.py", 3) == "cell:3"
    assert describe_source("/a/b c/é.py", 3) == "é.py:3"


def test_elements_that_two_programs_store() -> None:
    out = torch.zeros(20, dtype=torch.int32)
    with trace() as t:
        overlap_kernel[(3,)](out, 6, BLOCK=8)
        overlap_kernel[(2,)](out, 8, BLOCK=8)
    assert [(g.argument, g.elements.tolist(), g.programs, g.launch, g.reason) for g in t.races] == [
        ("out", [6, 7, 12, 13], ((0,), (1,), (2,)), 0, "race")
    ]
    assert t.report().splitlines() == [
        "no access outside its tensor; accesses: 5, launches: 2",
        f"{where('tl.store(out + i, i)', 'overlap_kernel')}: store out, elements 6–7 and 12–13 of 20, stored by 3 "
        "programs, first (0,) and (1,) of launch 0",
    ]


def test_a_race_of_two_lines_two_arguments_and_two_widths() -> None:
    memory = torch.zeros(8, dtype=torch.int32)
    with trace() as t:
        two_stores_kernel[(2,)](memory[:4], memory[2:4].view(torch.int16))
    (race,) = t.races
    assert (race.argument, race.elements.tolist(), race.size) == ("b", [0, 1], 4)
    assert race.line == line_of("tl.store(b + tl.arange(0, 2)") and race.programs == ((0,), (1,))
    with trace() as t:
        two_stores_kernel[(2,)](memory[:4], memory[4:6])
    assert t.races == []


def test_atomics_and_stores_outside_are_no_race() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    with trace() as t:
        count_kernel[(4,)](out, torch.zeros(1, dtype=torch.int32))
        overlap_kernel[(3,)](out, 0, BLOCK=8)
    assert out[0] == 0 and len(t.races) == 1 and t.races[0].elements.tolist() == [0, 1, 2, 3]
    assert {v.element for v in t.violations} == {4, 5, 6, 7}


def test_accesses_through_pointers_from_memory_are_counted() -> None:
    x, out = torch.tensor([3.0]), torch.zeros(3)
    with trace() as t:
        indirect_kernel[(3,)](torch.tensor([x.data_ptr()] * 3), out)
    assert (t.unchecked, len(t.accesses)) == (3, 9) and out.tolist() == [3, 3, 3]
    assert t.report().splitlines()[1:] == ["3 of 9 accesses not checked: their pointers were loaded from memory"]


def test_a_pointer_selected_lane_by_lane_belongs_to_the_argument_of_each_lane() -> None:
    a, b, out = torch.arange(4.0), torch.arange(10.0, 13.0), torch.zeros(8)
    with trace() as t:
        concat_kernel[(1,)](a, b, out, 4, BLOCK=8)
    assert out.tolist() == [0, 1, 2, 3, 10, 11, 12, 0]
    assert [(v.argument, v.element, v.size) for v in t.violations] == [("b", 3, 3)]
    assert [(a.argument, a.mask.sum()) for a in t.accesses] == [("a", 4), ("b", 4), ("out", 8)]


def test_nested_traces_both_record() -> None:
    x, out = torch.ones(4), torch.zeros(4)
    with trace(strict=False) as outer:
        copy_kernel[(1,)](x, out, 1, 0, 4, BLOCK=4)
        with trace() as inner:
            copy_kernel[(1,)](torch.ones(8)[::2], out, 1, 0, 4, BLOCK=4)
        copy_kernel[(1,)](x, out, 1, 1, 4, BLOCK=4)
    assert (len(outer.launches), len(inner.launches), len(outer.accesses), len(inner.accesses)) == (3, 1, 6, 2)
    assert [(v.element, v.launch) for v in outer.violations] == [(4, 2)]
    assert [(v.element, v.launch) for v in inner.violations] == [(1, 0), (3, 0)]


def test_a_trace_may_end_after_the_one_in_it() -> None:
    first, second = trace(), trace()
    outer = first.__enter__()
    inner = second.__enter__()
    first.__exit__(None, None, None)
    copy_kernel[(1,)](torch.ones(4), torch.zeros(4), 1, 0, 4, BLOCK=4)
    second.__exit__(None, None, None)
    copy_kernel[(1,)](torch.ones(4), torch.zeros(4), 1, 0, 4, BLOCK=4)
    assert (len(outer.launches), len(inner.launches)) == (0, 1)


def test_a_second_thread_is_refused() -> None:
    found: list[BaseException] = []

    def other() -> None:
        try:
            with trace():
                pass
        except TraceError as error:
            found.append(error)

    with trace():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert [str(e) for e in found] == [
        "a trace is active in another thread; accepted: one thread that traces at a time"
    ]


def test_autotuned_kernels_run_with_their_first_configuration() -> None:
    x, out = torch.ones(20), torch.zeros(20)
    with trace() as t:
        for least in (0, 8, 8):
            tuned[lambda meta: (triton.cdiv(20, meta["BLOCK"]),)](x, out, 20, least)
    assert [launch.grid for launch in t.launches] == [(5,), (3,), (3,)]
    assert out.tolist() == [5.0] * 20 and len(tuned.configs) == 3
    assert [note.split(", num")[0] for note in t.notes] == [
        "tuned_kernel() is autotuned; it ran with the first of 3 configurations: BLOCK: 4",
        "tuned_kernel() is autotuned; it ran with the first of 2 configurations: BLOCK: 8",
    ]
    assert t.report().splitlines()[1].startswith("note: tuned_kernel() is autotuned")


def test_a_dot_of_bfloat16_warns() -> None:
    eye = torch.eye(16)
    with trace() as t:
        dot_kernel[(1,)](eye.half(), eye.half(), torch.zeros(16, 16), N=16)
    assert t.notes == []
    out = torch.zeros(16, 16)
    with (
        pytest.warns(InterpreterWarning, match=r"^tl\.dot of bfloat16 is wrong in Triton's interpreter") as warned,
        trace() as t,
    ):
        for _ in range(3):
            dot_kernel[(1,)](eye.bfloat16(), eye.bfloat16(), out, N=16)
    assert len(warned) == 1
    assert not torch.equal(out, eye), "this version multiplies BF16 right, and the hook should have seen that"
    assert (warned[0].filename, warned[0].lineno) == (str(HERE), line_of("tl.dot(tl.load(a + i)"))
    assert len(t.notes) == 1 and t.report().splitlines()[-1] == f"note: {t.notes[0]}"


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_a_fnuz_argument_warns(name: str) -> None:
    codes = torch.zeros(4, dtype=torch.uint8).view(getattr(torch, name))
    with (
        pytest.warns(
            InterpreterWarning, match=rf"^codes of bytes_kernel\(\) has dtype {name}, .* pass codes.view"
        ) as warned,
        trace(),
    ):
        bytes_kernel[(1,)](codes, torch.zeros(4), BLOCK=4)
    assert (warned[0].filename, warned[0].lineno) == (str(HERE), line_of("bytes_kernel[(1,)](codes,"))


def test_an_empty_report_is_that_of_no_launch() -> None:
    t = Trace()
    assert (t.groups, t.races, t.unwritten, t.unchecked, t.violations) == ([], [], [], 0, [])
