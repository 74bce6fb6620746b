"""The trace: what it records of kernels that are right, and what it reports of kernels that are not."""

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
def test_the_scalar_read_as_a_row_per_token(call, layout, dtype):
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
    assert t.report().splitlines()[2] == f"k_scale_ptr: element 159 of 1, line {t.violations[2].line}, program (0, 1)"
    assert not case.got[0].any()  # what was not read is 0


@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
def test_a_right_gather_is_clean_and_touches_the_bytes_of_its_token(call, layout):
    case = call(layout, torch.float8_e4m3fn, torch.rand(6, 2, 16) + 0.5)
    with trace() as t:
        before_fix.cp_mha_gather_cache(**case.arguments)
    assert t.violations == []
    assert t.report() == "no access outside its tensor; accesses: 60, launches: 1"
    assert torch.equal(case.got[0], case.want[0])
    strides = PoolStrides.of(case.arguments["key_cache"], layout, "key")
    wanted = sorted(int(strides.offset(3, 1, 1, dim)) for dim in range(16))
    assert t.bytes_touched("key_cache_ptr", (2, 1)).tolist() == wanted
    assert t.bytes_touched("key_ptr", (2, 1), "store").tolist() == list(range(5 * 64, 6 * 64))
    assert t.bytes_touched("key_ptr", (2, 1), "load").tolist() == []


def test_a_per_head_scale_escapes_the_shipped_fix(call):
    case = call("SHUFFLE", torch.float8_e4m3fn, torch.ones(6, 2, 16))
    case.arguments |= {name: torch.ones(2).to(case.arguments[name].device) for name in ("k_scales", "v_scales")}
    with trace() as t:
        before_fix.cp_mha_gather_cache_shipped_fix(**case.arguments)
    assert {(v.argument, v.size) for v in t.violations} == {("k_scale_ptr", 2), ("v_scale_ptr", 2)}
    assert len(t.violations) == 12


@pytest.mark.parametrize("scale", [torch.tensor([0.5]), torch.tensor([0.5, 0.25])])
def test_the_gather_of_this_package_is_clean(call, scale):
    case = call("SHUFFLE", torch.float8_e4m3fn, torch.ones(1))
    a = case.arguments
    scale = scale.to(a["key_cache"].device)
    plan = kvgather.GatherPlan.build(
        a["block_tables"], a["cu_seqlens_kv"], page_size=16, num_blocks=6, total_tokens=3, seq_starts=a["seq_starts"]
    )
    with trace() as t:
        kvgather.gather(
            a["key_cache"], a["value_cache"], plan, layout="SHUFFLE", k_scale=scale, v_scale=scale, backend="triton"
        )
    assert t.violations == []
    assert len(t.launches) == 1
    assert t.accesses


def test_both_ends_the_mask_and_the_line():
    x, out = torch.arange(6.0), torch.zeros(6)
    with trace() as t:
        shift_kernel[(2,)](x, out, 6, 2, BLOCK=4)
        shift_kernel[(2,)](x, out, 6, -1, BLOCK=4)
    line = line_of("x = tl.load(x_ptr + i + by")
    assert t.report() == "\n".join(
        [
            f"x_ptr: element 6 of 6, line {line}, program (1,)",
            f"x_ptr: element 7 of 6, line {line}, program (1,)",
            f"x_ptr: element -1 of 6, line {line}, program (0,)",
        ]
    )
    assert t.report(limit=1).splitlines()[1:] == ["and 2 more"]
    assert out.tolist() == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    load = next(t.select("x_ptr", (1,), "load"))
    assert (load.file, load.kernel, load.launch, load.width) == (str(HERE), "shift_kernel", 0, 4)
    assert load.elements.tolist() == [6, 7, 8, 9]
    assert load.mask.tolist() == [True, True, False, False]
    assert load.outside.tolist() == [True, True, False, False]


def test_lanes_that_were_skipped_give_0_and_masked_ones_the_kernels_other():
    x, out = torch.arange(1.0, 4.0), torch.zeros(8)
    with trace():
        shift_kernel[(1,)](x, out, 8, 2, BLOCK=8)
    assert out.tolist() == [3.0] + [0.0] * 7
    arena = torch.arange(16.0)
    with trace(skip_outside=False) as t:
        shift_kernel[(1,)](arena[:3], out, 8, 2, BLOCK=8)
    assert len(t.violations) == 7
    assert out.tolist() == arena[2:10].tolist()


def test_an_address_inside_another_tensor_is_still_outside_its_own():
    arena = torch.arange(16.0)
    with trace() as t:
        shift_kernel[(1,)](arena[:4], arena[4:8], 4, 4, BLOCK=4)
    assert [(v.argument, v.element) for v in t.violations] == [("x_ptr", i) for i in (4, 5, 6, 7)]


def test_helpers_and_atomics():
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


def test_an_element_that_is_half_outside_is_outside():
    out = torch.zeros(8, dtype=torch.uint8)
    with trace() as t:
        copy_bytes_kernel[(1,)](torch.zeros(3, dtype=torch.int16), out, BLOCK=8)
    assert [v.element for v in t.violations] == [3, 3]
    assert t.bytes_touched("x_ptr").tolist() == list(range(8))


def test_strict_also_finds_the_gaps_of_a_strided_view():
    pool, out = torch.arange(12.0).reshape(3, 4), torch.zeros(12)
    view = pool[:, :2]  # elements 0, 1, 4, 5, 8, 9 of the pool
    for strict, want in ((False, [10, 11]), (True, [2, 3, 6, 7, 10, 11])):
        with trace(strict=strict) as t:
            shift_kernel[(1,)](view, out, 12, 0, BLOCK=16)
        assert [v.element for v in t.violations] == want
        assert {v.size for v in t.violations} == {10}


def test_no_elements_and_no_launches():
    with trace() as t:
        pass
    assert t.report() == "no access outside its tensor; accesses: 0, launches: 0"
    assert t.bytes_touched("x_ptr").dtype == np.int64
    with trace() as t:
        shift_kernel[(1,)](torch.zeros(0), torch.zeros(1), 1, 0, BLOCK=1)
    assert [str(v).split(",")[0] for v in t.violations] == ["x_ptr: element 0 of 0"]


def test_nothing_stays_hooked(call):
    from triton.runtime import interpreter

    names = [
        (interpreter.InterpreterBuilder, "create_masked_load"),
        (interpreter.GridExecutor, "__call__"),
        (interpreter, "_implicit_cvt"),
        (triton.runtime.jit.JITFunction, "run"),
    ]
    before = [getattr(owner, name) for owner, name in names]
    with pytest.raises(RuntimeError, match="mine"), trace():
        raise RuntimeError("mine")
    assert [getattr(owner, name) for owner, name in names] == before


def test_a_foreign_interpreter_is_refused_by_version(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(triton, "__version__", "9.9.9")
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_masked_store")
    with pytest.raises(TraceError, match=r"triton 9\.9\.9: it has no InterpreterBuilder\.create_masked_store"), trace():
        pass


def test_kernels_that_were_decorated_for_compilation_are_traced_too():
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
    assert child.stdout == f"x_ptr: element 1 of 1, line {line_of('return tl.load(pointer')}, program (0, 1)\n", (
        child.stderr
    )


def test_a_traced_gather_that_was_compiled_for_a_gpu_still_gives_the_reference():
    """The interpreter neither rounds nor decodes as hardware does, and the launcher has to know where it runs."""
    code = """
import torch
from kvgather.cases import Case, build
from kvgather.device import interpreting
from kvgather.lab.trace import trace
built = build(Case(num_heads=2, k_dim=16, v_dim=16, lengths=(19,), starts=()), torch.device("cpu"), values="normal")
wanted = built.cache.gather(built.plan, backend="torch")
with trace() as t:
    assert interpreting()
    got = built.cache.gather(built.plan, backend="triton")
assert not interpreting() and t.accesses and not t.violations
print(all(torch.equal(*pair) for pair in zip(got, wanted, strict=True)))
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(TRITON_INTERPRET="0")
    )
    assert child.stdout == "True\n", child.stderr
