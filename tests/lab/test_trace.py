"""The trace: recorded accesses of correct kernels, and reported accesses outside a tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kvgather
from kvgather.formats.layout import PoolStrides
from kvgather.lab import before_fix
from kvgather.lab.child import environment
from kvgather.lab.trace import TraceError, trace

pytestmark = pytest.mark.triton
if kvgather.device.triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def shift_kernel(x_ptr, out_ptr, n, by, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i + by, mask=i < n, other=7.0)
        tl.store(out_ptr + i, x, mask=i < n)

    @triton.jit
    def load_at(pointer, offset):
        return tl.load(pointer + offset)

    @triton.jit
    def helper_kernel(x_ptr, out_ptr):
        x = load_at(x_ptr, tl.program_id(1))
        tl.atomic_add(out_ptr + tl.program_id(0), x)

    @triton.jit
    def copy_bytes_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr.to(tl.pointer_type(tl.uint8)) + i))


HERE = Path(__file__)


def line_of(text: str) -> int:
    return 1 + next(i for i, line in enumerate(HERE.read_text().splitlines()) if text in line)


@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_scalar_indexed_by_block_head_and_slot_is_reported(call, layout, dtype):
    case = call(layout, dtype, torch.tensor([0.5]))
    with trace() as t:
        before_fix.cp_mha_gather_cache(**case.arguments)
    places = [(4, 15), (1, 0), (3, 1)]  # (block, slot) of each token
    want = [
        (argument, (block * 2 + head) * 16 + slot, (token, head))
        for token, (block, slot) in enumerate(places)
        for head in range(2)
        for argument in ("k_scale_ptr", "v_scale_ptr")
    ]
    assert [(v.argument, v.element, v.program) for v in t.violations] == want
    source = Path(before_fix.__file__).read_text().splitlines()
    assert all("tl.load(" + v.argument in source[v.line - 1] for v in t.violations)
    assert {v.size for v in t.violations} == {1}
    line = t.violations[0].line
    elements = "elements 32, 48, 97, …, 159 (6 elements) of 1"
    where = f"before_fix.py:{line} in gather_one_head_kernel()"
    assert t.report().splitlines()[0] == f"{where}: load k_scale_ptr, {elements}, first program (0, 0)"
    assert len(t.report().splitlines()) == 2
    assert not case.got[0].any()  # a skipped load of the scale gives 0


@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
def test_a_correct_gather_accesses_only_the_bytes_of_its_token(call, layout):
    case = call(layout, torch.float8_e4m3fn, torch.rand(6, 2, 16) + 0.5)
    with trace() as t:
        before_fix.cp_mha_gather_cache(**case.arguments)
    assert t.violations == []
    assert t.report() == "no access outside its tensor; accesses: 60, launches: 1"
    assert torch.equal(case.got[0], case.want[0])
    strides = PoolStrides.of(case.arguments["key_cache"], layout, "key")
    offsets = sorted(int(strides.offset(3, 1, 1, dim)) for dim in range(16))
    assert t.bytes_touched("key_cache_ptr", (2, 1)).tolist() == offsets
    assert t.bytes_touched("key_ptr", (2, 1), "store").tolist() == list(range(5 * 64, 6 * 64))
    assert t.bytes_touched("key_ptr", (2, 1), "load").tolist() == []


def test_the_shipped_fix_reads_past_a_per_head_scale(call):
    case = call("SHUFFLE", torch.float8_e4m3fn, torch.ones(6, 2, 16))
    case.arguments |= {name: torch.ones(2).to(case.arguments[name].device) for name in ("k_scales", "v_scales")}
    with trace() as t:
        before_fix.cp_mha_gather_cache_shipped_fix(**case.arguments)
    assert {(v.argument, v.size) for v in t.violations} == {("k_scale_ptr", 2), ("v_scale_ptr", 2)}
    assert len(t.violations) == 12


@pytest.mark.parametrize("scale", [torch.tensor([0.5]), torch.tensor([0.5, 0.25])])
def test_the_gather_of_this_package_reads_nothing_outside(call, scale):
    arguments = call("SHUFFLE", torch.float8_e4m3fn, torch.ones(1)).arguments
    key_cache, value_cache = arguments["key_cache"], arguments["value_cache"]
    scale = scale.to(key_cache.device)
    plan = kvgather.GatherPlan.build(
        arguments["block_tables"], arguments["cu_seqlens_kv"], page_size=16, num_blocks=6, total_tokens=3,
        seq_starts=arguments["seq_starts"],
    )  # fmt: skip
    with trace() as t:
        kvgather.gather(key_cache, value_cache, plan, layout="SHUFFLE", k_scale=scale, v_scale=scale, backend="triton")
    assert t.violations == []
    assert len(t.launches) == 1
    assert t.accesses


def test_a_violation_has_its_element_line_program_and_mask():
    x, out = torch.arange(6.0), torch.zeros(6)
    with trace() as t:
        shift_kernel[(2,)](x, out, 6, 2, BLOCK=4)
        shift_kernel[(2,)](x, out, 6, -1, BLOCK=4)
    line = line_of("x = tl.load(x_ptr + i + by")
    where = f"test_trace.py:{line} in shift_kernel(): load x_ptr"
    assert t.report() == f"{where}, elements -1 and 6–7 of 6, first program (1,) of launch 0, in 2 launches"
    assert out.tolist() == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    load = next(t.select("x_ptr", (1,), "load"))
    assert (load.file, load.kernel, load.launch, load.width) == (str(HERE), "shift_kernel", 0, 4)
    assert load.elements.tolist() == [6, 7, 8, 9]
    assert load.mask.tolist() == [True, True, False, False]
    assert load.outside.tolist() == [True, True, False, False]


def test_skipped_lanes_give_0_and_masked_lanes_give_other():
    x, out = torch.arange(1.0, 4.0), torch.zeros(8)
    with trace():
        shift_kernel[(1,)](x, out, 8, 2, BLOCK=8)
    assert out.tolist() == [3.0] + [0.0] * 7
    arena = torch.arange(16.0)
    with trace(skip_outside=False) as t:
        shift_kernel[(1,)](arena[:3], out, 8, 2, BLOCK=8)
    assert len(t.violations) == 7
    assert out.tolist() == arena[2:10].tolist()


def test_an_address_inside_another_tensor_is_outside_its_argument():
    arena = torch.arange(16.0)
    with trace() as t:
        shift_kernel[(1,)](arena[:4], arena[4:8], 4, 4, BLOCK=4)
    assert [(v.argument, v.element) for v in t.violations] == [("x_ptr", i) for i in (4, 5, 6, 7)]


def test_atomics_and_accesses_in_called_functions_are_recorded():
    x, out = torch.tensor([5.0]), torch.zeros(2)
    with trace() as t:
        helper_kernel[(3, 2)](x, out)
    assert out.tolist() == [5.0, 5.0]
    assert [(v.argument, v.element, v.kind, v.program) for v in t.violations] == [
        ("x_ptr", 1, "load", (0, 1)),
        ("x_ptr", 1, "load", (1, 1)),
        ("out_ptr", 2, "atomic", (2, 0)),
        ("x_ptr", 1, "load", (2, 1)),
        ("out_ptr", 2, "atomic", (2, 1)),
    ]
    assert t.violations[0].line == line_of("return tl.load(pointer")


def test_an_access_that_is_partly_outside_is_outside():
    out = torch.zeros(8, dtype=torch.uint8)
    with trace() as t:
        copy_bytes_kernel[(1,)](torch.zeros(3, dtype=torch.int16), out, BLOCK=8)
    assert [v.element for v in t.violations] == [3, 3]
    assert t.bytes_touched("x_ptr").tolist() == list(range(8))


def test_a_strict_trace_reports_the_gaps_of_a_strided_view():
    pool, out = torch.arange(12.0).reshape(3, 4), torch.zeros(12)
    view = pool[:, :2]  # elements 0, 1, 4, 5, 8, 9 of the pool
    for strict, want in ((False, [10, 11]), (True, [2, 3, 6, 7, 10, 11])):
        with trace(strict=strict) as t:
            shift_kernel[(1,)](view, out, 12, 0, BLOCK=16)
        assert [v.element for v in t.violations] == want
        assert {v.size for v in t.violations} == {10}


def test_empty_traces_and_empty_tensors():
    with trace() as t:
        pass
    assert t.report() == "no access outside its tensor; accesses: 0, launches: 0"
    assert t.bytes_touched("x_ptr").dtype == np.int64
    with trace() as t:
        shift_kernel[(1,)](torch.zeros(0), torch.zeros(1), 1, 0, BLOCK=1)
    assert [str(v).split(": ")[1] for v in t.violations] == ["load x_ptr, element 0 of 0, program (0,)"]


def test_an_exception_in_the_body_removes_the_hooks(call):
    from triton.runtime import interpreter

    names = [
        (interpreter.InterpreterBuilder, "create_masked_load"),
        (interpreter.GridExecutor, "__call__"),
        (interpreter, "_implicit_cvt"),
        (triton.runtime.jit.JITFunction, "run"),
    ]
    before = [getattr(owner, name) for owner, name in names]
    with pytest.raises(RuntimeError, match="an error in the body"), trace():
        raise RuntimeError("an error in the body")
    assert [getattr(owner, name) for owner, name in names] == before


def test_an_incompatible_interpreter_is_rejected_with_its_version(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(triton, "__version__", "9.9.9")
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_masked_store")
    with pytest.raises(TraceError, match=r"triton 9\.9\.9: it has no InterpreterBuilder\.create_masked_store"), trace():
        pass


def test_kernels_decorated_for_compilation_are_traced():
    code = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
import torch, kvgather
import test_trace
assert not kvgather.device.interpreting()
with test_trace.trace() as t:
    test_trace.helper_kernel[(1, 2)](torch.tensor([5.0]), torch.zeros(1))
print(t.report())
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(TRITON_INTERPRET="0")
    )
    where = f"test_trace.py:{line_of('return tl.load(pointer')} in helper_kernel()"
    assert child.stdout == f"{where}: load x_ptr, element 1 of 1, first program (0, 1)\n", child.stderr


def test_a_traced_gather_decorated_for_compilation_equals_the_reference():
    """The interpreter rounds and decodes differently from hardware, so the launcher must detect the trace."""
    code = """
import torch
from kvgather.cases import Case, build
from kvgather.device import interpreting
from kvgather.lab.trace import trace
built = build(Case(num_heads=2, k_dim=16, v_dim=16, lengths=(19,), starts=()), torch.device("cpu"), values="normal")
reference = built.cache.gather(built.plan, backend="torch")
with trace() as t:
    assert interpreting()
    rows = built.cache.gather(built.plan, backend="triton")
assert not interpreting() and t.accesses and not t.violations
print(all(torch.equal(*pair) for pair in zip(rows, reference, strict=True)))
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(TRITON_INTERPRET="0")
    )
    assert child.stdout == "True\n", child.stderr
