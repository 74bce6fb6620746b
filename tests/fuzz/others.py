"""Calls of what says where kernels run, and of the fence."""

from __future__ import annotations

import mmap
from typing import Any

import torch

from tests.fuzz import forms
from tests.fuzz.case import Builder, Case, Draw, Facts, Wrong, bad, either, good
from tests.fuzz.pools import FP8

NO_DEVICES = bad("'gpu'", "3", "True", "b'cpu'", "''", "'cpu:x'", "'cuda:-1'", "[]", "object()", "torch.float32", "{}",
                 "'x' * 3000", "torch.zeros(2)", "float('nan')", "('cpu',)", "np.zeros(2)", "10**5000")  # fmt: skip
OTHER_DEVICES = either("'meta'", "'cuda:7'", "'xpu'", "'mps'", "'hpu'", "'cuda'", "torch.device('cuda', 3)")


def device(draw: Draw) -> Case:
    """`fp8_support`, `resolve_device`, `fp8_in_hardware`, `doctor`."""
    what = draw.one("fp8_support", "resolve_device", "parse_device", "fp8_in_hardware", "doctor")
    build = Builder(draw, f"device.{what}", f"kg.device.{what}", warm=0)
    if what == "fp8_in_hardware":
        backend = draw.one("cuda", "hip")
        known = draw.one("80", "86", "89", "90", "100", "120") if backend == "cuda" else draw.one(
            "gfx90a", "gfx942", "gfx950", "gfx1201", "gfx1100"
        )  # fmt: skip
        build.arg("backend", repr(backend), forms.word("cuda", "hip"))
        unusual = "''", "'sm_90'", "'9.0'", "'x' * 3000", "'-1'", "'\\u0669'", "'1e3'", "'90a'"
        junk = "None", "90", "b'90'", "[]", "float('nan')", "torch.zeros(1)", "True"
        build.arg("arch", repr(known), bad(*junk), either(*unusual, names=("backend",)))
    elif what != "doctor":
        optional = what != "parse_device"
        build.arg("device", draw.one("'cpu'", "torch.device('cpu')", "'cpu:0'", *(["None"] if optional else [])),
                  NO_DEVICES, OTHER_DEVICES, [] if optional else bad("None"))  # fmt: skip

    def check(facts: Facts, result: Any) -> None:
        given = facts.args.get("device")
        if what == "fp8_support":
            names = {str(dtype) for dtype in result}
            if names != {f"torch.{name}" for name in FP8} or not set(result.values()) <= {"hardware", "software"}:
                raise Wrong(f"gave {result}")
        elif what == "fp8_in_hardware":
            want = _hardware(facts.args["backend"], facts.args["arch"])
            if result != want:
                raise Wrong(f"gave {result}, and should give {want}")
        elif what == "doctor":
            if list(result.rows) != ["python", "torch", "triton", "GPU", "Triton kernels", "FP8 decode", "notebooks"]:
                raise Wrong(f"gave {result.rows}")
            str(result)
        elif given is not None and result != torch.device(given):
            raise Wrong(f"gave {result}, and should give {given}")

    return build.finish(check)


def _hardware(backend: str, arch: str) -> set[torch.dtype]:
    ocp, fnuz = {torch.float8_e4m3fn, torch.float8_e5m2}, {torch.float8_e4m3fnuz}
    if backend == "cuda":
        return ocp if int(arch) >= 89 else set()
    return ocp if arch[:5] == "gfx12" or arch[:6] == "gfx950" else fnuz if arch[:5] == "gfx94" else set()


def fenced(draw: Draw) -> Case:
    build = Builder(draw, "lab.fence.fenced", "fenced", warm=0)
    shape = tuple(draw.choice([0, 1, 2, 3, 7]) for _ in range(draw.randint(0, 3)))
    shape = (1000, *shape[1:]) if shape and draw.chance(0.1) else shape
    dtype = draw.one(*FP8, "float32", "float64", "bfloat16", "float16", "int8", "uint8", "int64", "bool", "complex64",
                     "complex128", "int16", "uint16", "uint32", "uint64")  # fmt: skip
    make = f"codes(SHAPE, seed={draw.number()}).to(torch.float32).to(torch.{dtype})"
    code = forms.strided(draw, make, shape, overlapping=True) if shape else f"({make.replace('SHAPE', '1')})[0]"
    if dtype == "complex64" and draw.chance(0.5):
        code = f"({code}).conj()"
    if dtype == "float32" and draw.chance(0.2):
        code = f"negative({code})"
    if draw.chance(0.15):
        code = draw.one("3", "0.5", "np.float32(2)", "float('nan')", "-float('inf')", "np.int64(7)", "1e-46")
    build.line(f"value = {code}")
    junk = bad("None", "True", "'x'", "b'x'", "[]", "[1.0]", "object()", "1j", "1e39", "10**400", "10**5000",
               "np.zeros(3)",
               "torch.zeros(3).to('meta')", "torch.zeros(2, 2).to_sparse()", "np.bool_(True)", "decimal.Decimal(1)",
               "torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)", "without_memory(torch.zeros(3))",
               "torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)", "{}")  # fmt: skip
    build.arg("value", "value", junk, good("torch.ones(3, requires_grad=True)", "torch.zeros(0, 5)"))
    build.arg("device", "'cpu'", NO_DEVICES, OTHER_DEVICES, bad("None"), leave_out=0.4)
    build.arg("side", draw.one("'after'", "'before'"), forms.word("after", "before"), leave_out=0.3)
    size = draw.one("1", "4096", "2**20", "2**26", "np.int64(5)")
    build.arg("guard_bytes", size, forms.integer(1, 2**46), either("2**46", "2**45"), leave_out=0.4)
    build.arg("keep_strides", draw.one("True", "False"), bad("None", "1", "'yes'"), leave_out=0.5)

    def check(facts: Facts, result: Any) -> None:
        given = facts.args["value"]
        kept = bool(facts.args.get("keep_strides")) and isinstance(given, torch.Tensor)
        if not isinstance(given, torch.Tensor):
            given = torch.tensor([float(given)], dtype=torch.float32)
        strides = given.stride() if kept else result.stride()
        given = given.detach().resolve_conj().resolve_neg()
        laid_out = result.stride() == strides if kept else result.is_contiguous()
        if result.dtype != given.dtype or result.shape != given.shape or not laid_out:
            raise Wrong(f"gave {result.dtype} of shape {list(result.shape)}, strides {list(result.stride())}")
        if result.is_meta or result.device.type != "cpu" or not given.numel():
            return
        flat = [tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
                for tensor in (given, result)]  # fmt: skip
        if not torch.equal(*flat):
            raise Wrong("its bytes are others")
        span = 1 + sum((size - 1) * stride for size, stride in zip(result.shape, strides, strict=True))
        begin, end = result.data_ptr(), result.data_ptr() + span * given.element_size()
        if (begin if facts.args.get("side") == "before" else end) % mmap.PAGESIZE:
            raise Wrong(f"no page ends at its {'begin' if facts.args.get('side') == 'before' else 'end'}")

    return build.finish(check)
