"""An error inside a kernel names the kernel, the reader's line, the cause, and what to change."""

from __future__ import annotations

import itertools
import linecache
from typing import Any

import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

import kvgather
from kvgather.lab.trace import trace
from kvgather.workbook import checks
from kvgather.workbook.kernel_errors import explain, kernel_error, short_tracebacks

pytestmark = pytest.mark.triton

COPY = """@triton.jit
def copy_kernel(out_ptr, x_ptr, n, LANES: tl.constexpr):
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    numbers = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, numbers, mask=i < n)
"""
FILES = itertools.count()


def kernel(source: str, name: str = "copy_kernel") -> Any:
    """A kernel from the source of a cell; its file exists in Python's cache of lines only, as that of a cell does."""
    import triton
    import triton.language as tl

    file = f"/tmp/ipykernel_7/{next(FILES)}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    names = {"triton": triton, "tl": tl, "torch": torch, "__name__": "__main__"}
    exec(compile(source, file, "exec"), names)
    return names[name]


def error_of(source: str, *arguments: Any, grid: Any = (3,), **constants: int) -> BaseException:
    """What a launch under a trace raises."""
    function = kernel(source)
    tensors = arguments or (torch.zeros(10), torch.arange(10.0), 10)
    with pytest.raises(Exception) as caught, trace():
        function[grid](*tensors, **(constants or {"LANES": 4}))
    return caught.value


@pytest.mark.parametrize(
    ("old", "new", "line", "cause", "advice"),
    [
        ("tl.load", "tl.laod", 4, "AttributeError: module 'triton.language' has no attribute 'laod'", ""),
        ("x_ptr + i", "x_ptr + j", 4, "NameError: name 'j' is not defined", ""),
        ("x_ptr + i", "x_ptr + i / 2", 4, "IncompatibleTypeError: invalid operands", "// divides, / gives a float"),
        ("x_ptr + i", "x_ptr * i", 4, "IncompatibleTypeError: invalid operands", "a pointer takes an offset"),
        ("x_ptr + i", "x_ptr[i]", 4, "TypeError: ", "a pointer has no index"),
        ("x_ptr + i", "i", 4, "ValueError: Unsupported ptr type", "tl.load takes addresses"),
        ("LANES: tl.constexpr", "LANES", 3, "ValueError: arange's arguments", "NAME: tl.constexpr"),
        ("other=0.0)", "other=0.0).to(torch.float32)", 4, "AttributeError: 'torch.dtype'", "such as tl.float32"),
        ("tl.load(x_ptr + i, mask=i < n, other=0.0)", "x_ptr + i", 5, "AssertionError: cannot cast", "tl.load takes"),
    ],
)
def test_a_mistake_has_its_line_its_cause_and_advice(old, new, line, cause, advice):
    source = COPY.replace(old, new, 1)
    assert source != COPY
    error = error_of(source)
    found = kernel_error(error)
    assert found is not None and (found.kernel, found.line, found.program) == ("copy_kernel", line, (0,))
    assert found.source == source.splitlines()[line - 1].strip()
    assert found.message.startswith(cause) and "\n" not in found.message
    assert advice in found.advice and bool(advice) == bool(found.advice)
    said = explain(error).split("\n")
    assert said[0] == "copy_kernel stopped in program (0,)"
    assert said[1].endswith(f"line {line}:  {found.source}") and said[2] == found.message
    assert said[3:] == ([f"→ {found.advice}"] if advice else [])


def test_too_many_or_odd_lanes():
    assert "triton.next_power_of_2" in explain(error_of(COPY, LANES=3))


def test_an_argument_that_is_no_tensor():
    error = error_of(COPY, torch.zeros(10), [0.0] * 10, 10)
    assert "a kernel's arguments are tensors and numbers" in explain(error)


def test_the_program_that_stopped_is_named():
    late = COPY.replace("    tl.store", "    if tl.program_id(0) == 2:\n        undefined\n    tl.store")
    assert "stopped in program (2,)\n" in explain(error_of(late))
    two_axes = COPY.replace("    tl.store", "    if tl.program_id(1) == 1:\n        undefined\n    tl.store")
    assert "stopped in program (0, 1)\n" in explain(error_of(two_axes, grid=(3, 2)))


def test_a_mistake_in_a_function_that_the_kernel_calls():
    helper = "@triton.jit\ndef twice(x):\n    return x * undefined\n\n\n"
    found = kernel_error(error_of(helper + COPY.replace("tl.load(", "twice(").replace(", mask=i < n, other=0.0", "")))
    assert found is not None and (found.kernel, found.line) == ("twice", 3)
    assert found.message == "NameError: name 'undefined' is not defined"


def test_a_call_without_a_grid():
    if kvgather.device.has_gpu():
        pytest.skip("a compiled kernel refuses the call itself")
    with pytest.raises(Exception) as caught:
        kernel(COPY)(torch.zeros(10), torch.arange(10.0), 10, LANES=4)
    assert "stopped without a launch" in explain(caught.value) and "kernel[grid](…)" in explain(caught.value)


def test_other_errors_are_left_as_they_are():
    assert kernel_error(ValueError("x")) is None
    assert explain(ValueError("x is 3")) == "ValueError: x is 3"
    assert kernel_error(error_of(COPY, grid=(2.5,))) is None  # in Triton's own loop: no line of the reader


def test_a_check_names_the_line_of_the_cell(monkeypatch, capsys):
    monkeypatch.setattr(checks, "_REGISTRY", {})

    @checks.exercise("99.1")
    def copies(function):
        with trace():
            function[(3,)](torch.zeros(10), torch.arange(10.0), 10, LANES=4)

    checks.check("99.1", kernel(COPY.replace("x_ptr + i", "x_ptr + i / 2")))
    said = capsys.readouterr().out
    assert said.startswith(
        "wrong: your kernel raised IncompatibleTypeError: invalid operands of type pointer<fp32> and"
    )
    assert ", on line 4 of your cell: numbers = tl.load(x_ptr + i / 2, mask=i < n, other=0.0) → an offset is" in said


def test_outside_of_a_notebook_nothing_changes():
    short_tracebacks()


def test_a_notebook_shows_four_lines_and_goes_on():
    start = (
        "import torch, kvgather, triton, triton.language as tl\n"
        "from kvgather.lab.trace import trace\n"
        "from kvgather.workbook.kernel_errors import short_tracebacks\nshort_tracebacks()"
    )
    launch = "with trace():\n    copy_kernel[(3,)](torch.zeros(10), torch.arange(10.0), 10, LANES=4)"
    cells = [start, COPY.replace("x_ptr + i", "x_ptr + i / 2"), launch, "1 / 0", launch.replace("3,", "2.5,"), "6 * 7"]
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    options = {"extra_arguments": ["--IPKernelApp.log_level=40"], "allow_errors": True}
    NotebookClient(notebook, kernel_name="python3", timeout=60, **options).execute()
    (short,), (plain,), (other,), (answer,) = (cell.outputs for cell in notebook.cells[2:])
    assert short.output_type == "error" and short.ename == "InterpreterError"
    assert short.traceback == [
        "copy_kernel stopped in program (0,)",
        "Cell In[2], line 4:  numbers = tl.load(x_ptr + i / 2, mask=i < n, other=0.0)",
        short.evalue,
        "→ an offset is an integer: // divides, / gives a float",
    ]
    assert plain.ename == "ZeroDivisionError" and "1" in "".join(plain.traceback)
    assert "cannot be interpreted as an integer" in other.evalue and len(other.traceback) > 1
    assert answer.data["text/plain"] == "42"
