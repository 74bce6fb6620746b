"""Checks of chapter 07: the sectors of a load, bytes in flight, lanes along V of SHUFFLE, and a wide load."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kvgather.cases import Case
from kvgather.formats.layout import as_nhd, byte_offset, key_shape, value_shape
from kvgather.lab.assembly import ERROR_LENGTH, width
from kvgather.lab.trace import trace
from kvgather.lab.warps import compile_steps
from kvgather.workbook.checks import NotYet, Wrong, exercise, expect

PAGE = 16


@exercise("07.1", correct="the GPU moves this many sectors for the load")
def sectors_of(answer: Callable[..., Any]) -> None:
    loads: dict[str, tuple[list[int], int, int]] = {
        "32 lanes, one byte each, side by side from byte 64": (list(range(64, 96)), 1, 1),
        "32 lanes, one byte each, side by side from byte 72": (list(range(72, 104)), 1, 2),
        "32 lanes, one byte each, 16 apart from byte 0": (list(range(0, 512, 16)), 1, 16),
        "32 lanes, one byte each, 16 apart from byte 5": (list(range(5, 517, 16)), 1, 16),
        "32 lanes, 16 bytes each, side by side from byte 0": (list(range(0, 512, 16)), 16, 16),
        "one lane, 16 bytes, from byte 24": ([24], 16, 2),
        "32 lanes, all at byte 100": ([100] * 32, 1, 1),
        "32 lanes, 16 bytes each, 256 apart": (list(range(0, 8192, 256)), 16, 32),
    }
    for name, (addresses, size, count) in loads.items():
        expect(count, answer(addresses, size), name)


@exercise("07.2", correct="times the round trips per second, this is the bandwidth")
def in_flight(answer: Callable[..., Any]) -> None:
    sizes = ((128, 4, 2048), (2048, 2, 65536), (16384, 16, 65536), (2048, 1, 65536), (300, 5, 3600), (4096, 64, 4096))
    for codes, warps, expected in sizes:
        expect(expected, answer(codes, warps), f"programs of {warps} warps that load {codes} bytes each")


@exercise("07.3", correct="32 lanes, one sector: neighbouring lanes read neighbouring tokens")
def place(answer: Callable[..., Any]) -> None:
    pool = torch.empty(value_shape("SHUFFLE", 1, PAGE, 1, 64, 1), dtype=torch.uint8)
    for lane in range(32):
        page_offset, dim = _two_ints(answer(lane), f"lane {lane}")
        if not (0 <= page_offset < PAGE and 0 <= dim < 64):
            raise Wrong(f"lane {lane}: page_offset {page_offset}, dim {dim} is not in a page of {PAGE}, 64 dims")
        expect(lane, byte_offset(pool, "SHUFFLE", "value", 0, 0, page_offset, dim), f"the byte that lane {lane} reads")


def _two_ints(got: Any, name: str) -> tuple[int, int]:
    """A page offset and a dim; NumPy's integers and tensors with one integer are ints, too."""
    values = got.tolist() if isinstance(got, torch.Tensor | np.ndarray) else got
    try:
        page_offset, dim = map(operator.index, values)
    except (TypeError, ValueError):
        raise Wrong(f"{name}: expected two ints, page_offset and dim, got {got!r:.60}") from None
    return page_offset, dim


@exercise(
    "07.4",
    correct="the same bytes, in loads of 16",
    not_yet="right values, in loads of one byte",
)
def copy_page_kernel(kernel: Any) -> None:
    if not hasattr(kernel, "fn"):
        raise Wrong(f"expected a Triton kernel, got {type(kernel).__name__}; keep the decorator")
    heads, dim = 2, 32
    pool = torch.randint(0, 256, key_shape("SHUFFLE", 3, PAGE, heads, dim, 1), dtype=torch.uint8)
    out = torch.zeros(PAGE, heads, dim, dtype=torch.uint8)
    with trace() as t:
        kernel[(1,)](out, pool, 1, HEADS=heads, PAGE=PAGE, DIM=dim)
    if t.violations:
        raise Wrong(f"an access outside a tensor: {t.violations[0].argument}, element {t.violations[0].element}")
    expect(as_nhd(pool, "SHUFFLE", "key")[1], out, "the page [page_offset, head, dim]")
    for name in kernel.fn.__code__.co_names:
        if hasattr(kernel.fn.__globals__.get(name), "fn"):
            raise Wrong(f"right values, but your kernel calls {name}; the check compiles one function: put it inside")
    case = Case(layout="SHUFFLE", num_heads=8, k_dim=64, v_dim=64, lengths=(PAGE,), starts=(), num_blocks=4)
    (compiled,) = compile_steps([(inspect.getsource(kernel.fn), case, "cuda:90")])
    if compiled.error:
        raise Wrong(f"the kernel does not compile: {_cause(compiled.error)}")
    narrow = [name for name in compiled.loads if width(name) < 16]
    shapes = [access.bytes.shape for access in t.select("k_ptr", kind="load")]
    if narrow and shapes == [(PAGE, heads * dim)]:
        raise NotYet
    if narrow:
        found = f"right values, but {compiled.loads[narrow[0]]} × {narrow[0]}: {width(narrow[0])} byte(s) a lane"
        if len(shapes) > 1:
            found += f"; 16 codes for each lane of {compiled.num_warps} warps are the whole page, so load it at once"
        raise Wrong(found)


def _cause(error: str) -> str:
    """The place and the last line of a compiler's message, without the source text between them."""
    first, *rest = error.splitlines()
    if len(error) < ERROR_LENGTH:  # a cut message ends in the source text
        first = " ".join([first, *rest[-1:]])
    return f"{first}; keep the kernel in one function" if "is not defined" in first else first
