"""Every load and store of a Triton kernel: the bytes that a program accesses, and those outside their tensor.

A general tool. A trace runs kernels in Triton's interpreter, on machines with and without a GPU, and records each
access with its source line, its argument and its program:

    from kvgather.lab.trace import trace

    with trace() as t:
        my_kernel[grid](x, scale, out)
    print(t.report())  # scale_ptr: element 656 of 1, line 93, program (0, 5)

The trace skips accesses outside their tensor (a load gives 0), so that the process survives and the trace contains all
of them. An access belongs to the argument that its address was computed from, even if the address is inside another
tensor: while the kernel runs, the top byte of each pointer contains the number of its argument. A pointer that a kernel
loads from memory has no such number; its accesses are recorded without an argument and are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..device import interpreted_meanwhile
from ._interpreter import Launch, Recorder, TraceError, hooked

__all__ = ["Access", "Trace", "TraceError", "Violation", "trace"]


@dataclass(frozen=True)
class Access:
    """One load, store or atomic, by one program.

    Attributes:
        kernel, launch: the kernel's name, and the index of the launch, from 0.
        program: the program's index along each axis of the grid.
        kind: "load", "store" or "atomic".
        argument: the kernel's argument that the address was computed from, or "" for a pointer from memory.
        file, line: the source line.
        bytes: int64, offset of each lane's first byte from the argument's `data_ptr()`; the shape of the access.
        width: bytes per lane.
        elements: int64, `bytes` in elements of the argument's dtype, rounded down.
        mask: lanes that the kernel's mask enables.
        outside: enabled lanes with at least one byte outside the argument.
        size: elements that the argument spans, from its first to its last.
    """

    kernel: str
    launch: int
    program: tuple[int, ...]
    kind: str
    argument: str
    file: str
    line: int
    bytes: NDArray[np.int64]
    width: int
    elements: NDArray[np.int64]
    mask: NDArray[np.bool_]
    outside: NDArray[np.bool_]
    size: int


@dataclass(frozen=True)
class Violation:
    """One accessed element outside its tensor; `str(violation)` is a line of the report."""

    argument: str
    element: int
    size: int
    kind: str
    file: str
    line: int
    program: tuple[int, ...]

    def __str__(self) -> str:
        program = ", ".join(map(str, self.program)) + ("," if len(self.program) == 1 else "")
        return f"{self.argument}: element {self.element} of {self.size}, line {self.line}, program ({program})"


@dataclass
class Trace:
    """The launches in the body of `trace()`, and their accesses."""

    accesses: list[Access] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    @property
    def violations(self) -> list[Violation]:
        """Accessed elements outside their tensor, in the order of execution."""
        return [
            Violation(a.argument, int(element), a.size, a.kind, a.file, a.line, a.program)
            for a in self.accesses
            for element in a.elements[a.outside]
        ]

    def report(self, limit: int | None = 20) -> str:
        """The violations, one a line, or "no access outside its tensor" with the number of accesses and launches.

        Args:
            limit: violations to print before "and N more"; None for all.
        """
        violations = self.violations
        if not violations:
            count, launches = len(self.accesses), len(self.launches)
            return f"no access outside its tensor; accesses: {count}, launches: {launches}"
        lines = [str(v) for v in (violations if limit is None else violations[:limit])]
        if len(violations) > len(lines):
            lines.append(f"and {len(violations) - len(lines)} more")
        return "\n".join(lines)

    def select(
        self,
        argument: str | None = None,
        program: tuple[int, ...] | None = None,
        kind: str | None = None,
    ) -> Iterator[Access]:
        """The accesses of one argument, one program and one kind; None selects all."""
        for access in self.accesses:
            if (
                argument in (None, access.argument)
                and program in (None, access.program)
                and kind in (None, access.kind)
            ):
                yield access

    def bytes_touched(
        self, argument: str, program: tuple[int, ...] | None = None, kind: str | None = None
    ) -> NDArray[np.int64]:
        """The bytes that a kernel accessed through an argument, inside and outside the tensor: sorted, unique.

        Args:
            argument: the argument's name in the kernel.
            program: the program whose accesses to include; None for all.
            kind: "load", "store" or "atomic"; None for all.

        Returns:
            int64 offsets in bytes from the argument's `data_ptr()`.
        """
        touched = [
            (a.bytes[a.mask][:, None] + np.arange(a.width)).ravel() for a in self.select(argument, program, kind)
        ]
        return np.unique(np.concatenate(touched)) if touched else np.zeros(0, np.int64)


@contextmanager
def trace(*, strict: bool = False, skip_outside: bool = True) -> Iterator[Trace]:
    """Context manager that runs Triton kernels in the interpreter and records their loads, stores and atomics.

    In its body, kernels that were decorated for a GPU run in the interpreter too; the interpreter copies their tensors
    to the CPU and back. Only one thread may trace at a time.

    Args:
        strict: whether an element between the first and the last element of a strided view that is not part of the
            view counts as outside. By default, the range from `data_ptr()` to the last element is inside.
        skip_outside: whether to skip accesses outside their tensor: loads give 0, stores have no effect. False
            executes them, which may crash the process.

    Yields:
        A `Trace`, to which each kernel appends its accesses.

    Raises:
        TraceError: triton is missing, or this module cannot hook its interpreter.
    """
    result = Trace()

    def record(
        launch: Launch,
        kind: str,
        address: NDArray[np.uint64],
        width: int,
        mask: NDArray[np.bool_],
        source: tuple[str, int],
    ) -> NDArray[np.bool_]:
        argument, offset = launch.locate(address)
        tensor = launch.arguments.get(argument)
        outside = np.zeros(mask.shape, bool) if tensor is None else mask & _outside(tensor, offset, width, strict)
        result.accesses.append(
            Access(
                kernel=launch.kernel,
                launch=launch.number,
                program=launch.program,
                kind=kind,
                argument=argument,
                file=source[0],
                line=source[1],
                bytes=offset,
                width=width,
                elements=offset // (tensor.element_size() if tensor is not None else width),
                mask=mask,
                outside=outside,
                size=_span(tensor) if tensor is not None else 0,
            )
        )
        return outside if skip_outside else np.zeros(mask.shape, bool)

    with interpreted_meanwhile(), hooked(Recorder(result.launches, record)):
        yield result


def _span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, both counted."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _outside(tensor: Tensor, offset: NDArray[np.int64], width: int, strict: bool) -> NDArray[np.bool_]:
    """Mask of the accesses of `width` bytes that have a byte outside the tensor."""
    itemsize = tensor.element_size()
    outside = (offset < 0) | (offset + width > _span(tensor) * itemsize)
    if strict and not tensor.is_contiguous():
        members = np.zeros(1, np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            members = (members[:, None] + np.arange(size) * stride).ravel()
        first, last = offset // itemsize, (offset + width - 1) // itemsize
        outside |= ~(np.isin(first, members) & np.isin(last, members))
    return outside
