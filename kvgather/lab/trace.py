"""Every load and store of a Triton kernel: which bytes a program touches, and which lie outside their tensor.

A general tool. It runs the kernels launched inside it in Triton's interpreter, GPU or not, and writes down
each access with its source line, its argument and its program:

    from kvgather.lab.trace import trace

    with trace() as t:
        my_kernel[grid](x, scale, out)
    print(t.report())  # scale_ptr: element 656 of 1, line 93, program (0, 5)

Accesses outside their tensor are not carried out (a load gives 0), so the process survives and the trace
shows all of them. An address belongs to the argument it was computed from, even where it lies inside
another tensor: while the kernel runs, each pointer carries the number of its argument in its top byte. A
pointer that was loaded from memory carries none; its accesses are recorded without an argument, and not
checked.
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
        kernel, launch: the kernel's name, and which launch it was, from 0.
        program: the program's index along each axis of the grid.
        kind: "load", "store" or "atomic".
        argument: the kernel's argument that the address was computed from, or "" for a pointer from memory.
        file, line: the source line.
        bytes: int64, first byte of each lane, counted from the argument's `data_ptr()`; the kernel's shape.
        width: bytes per lane.
        elements: int64, the same in elements of the argument's dtype, rounded down.
        mask: which lanes the kernel switched on.
        outside: which of those lanes are not wholly inside the argument.
        size: how many elements the argument spans, from its first to its last.
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
    """One element that was accessed outside its tensor; `str()` of it is a line of the report."""

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
    """What the launches inside `trace()` did."""

    accesses: list[Access] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    @property
    def violations(self) -> list[Violation]:
        """Every accessed element outside its tensor, in the order of execution."""
        return [
            Violation(a.argument, int(element), a.size, a.kind, a.file, a.line, a.program)
            for a in self.accesses
            for element in a.elements[a.outside]
        ]

    def report(self, limit: int | None = 20) -> str:
        """The violations, one a line, or one line that says that there are none.

        Args:
            limit: how many to print before "and N more"; None for all.
        """
        found = self.violations
        if not found:
            count, launches = len(self.accesses), len(self.launches)
            return f"no access outside its tensor; accesses: {count}, launches: {launches}"
        lines = [str(v) for v in (found if limit is None else found[:limit])]
        if len(found) > len(lines):
            lines.append(f"and {len(found) - len(lines)} more")
        return "\n".join(lines)

    def select(
        self,
        argument: str | None = None,
        program: tuple[int, ...] | None = None,
        kind: str | None = None,
    ) -> Iterator[Access]:
        """The accesses of one argument, one program and one kind; None is any."""
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
        """The bytes of an argument that were accessed, those outside it included: sorted, each once.

        Args:
            argument: the kernel's name for it.
            program: only that program's; None for all.
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
    """Run the Triton kernels launched inside in the interpreter, and record all they read and write.

    Kernels that were compiled for a GPU are interpreted too while this lasts; their tensors are copied to
    the CPU and back by Triton's interpreter. Not for several threads at once.

    Args:
        strict: also count an element as outside that lies between the first and the last of a strided view
            and does not belong to it. The default is the range from `data_ptr()` to the last element.
        skip_outside: do not carry out accesses that are outside: loads give 0, stores do nothing. False
            carries them out, crash included.

    Yields:
        A `Trace`, filled as kernels run.

    Raises:
        TraceError: triton is missing, or its interpreter is not one that this module knows how to hook.
    """
    result = Trace()

    def record(
        launch: Launch,
        kind: str,
        address: NDArray[np.uint64],
        width: int,
        mask: NDArray[np.bool_],
        at: tuple[str, int],
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
                file=at[0],
                line=at[1],
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
    """Elements from a tensor's first to its last, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _outside(tensor: Tensor, offset: NDArray[np.int64], width: int, strict: bool) -> NDArray[np.bool_]:
    """Which accesses of `width` bytes at these byte offsets are not wholly inside the tensor."""
    itemsize = tensor.element_size()
    outside = (offset < 0) | (offset + width > _span(tensor) * itemsize)
    if strict and not tensor.is_contiguous():
        members = np.zeros(1, np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            members = (members[:, None] + np.arange(size) * stride).ravel()
        first, last = offset // itemsize, (offset + width - 1) // itemsize
        outside |= ~(np.isin(first, members) & np.isin(last, members))
    return outside
