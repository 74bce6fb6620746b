"""What a trace records: each access of a program, and each accessed element outside its tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

__all__ = ["BETWEEN", "Access", "Violation", "describe_program", "describe_source"]

BETWEEN = "between the view's elements"
"""Why a strict trace reports an element between the first and the last element of a view."""


@dataclass(frozen=True)
class Access:
    """One load, store or atomic, by one program.

    Attributes:
        kernel, launch: the kernel's name, and the index of the launch, from 0.
        program: the program's index along each axis of the grid.
        kind: "load", "store" or "atomic".
        argument: the kernel's argument that the address was computed from, or "" for a pointer from memory.
        file, line: the source line.
        bytes: int64, offset of each lane's first byte from the argument's `data_ptr()`; the shape of the access. An
            address for a pointer from memory.
        width: bytes per lane.
        elements: int64, `bytes` in elements of the argument's dtype, rounded down.
        mask: lanes that the kernel's mask enables.
        outside: enabled lanes with at least one byte outside the argument, `between` included.
        size: elements that the argument spans, from its first to its last.
        itemsize: bytes of an element of the argument; `width` for a pointer from memory.
        base: the argument's `data_ptr()`; 0 for a pointer from memory.
        between: enabled lanes between the first and the last element of a view, with a byte that belongs to no
            element; None is none.
        unwritten: enabled lanes of a load or an atomic with a byte that nothing wrote; None is none.
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
    itemsize: int = 1
    base: int = 0
    between: NDArray[np.bool_] | None = None
    unwritten: NDArray[np.bool_] | None = None

    def flagged(self, lanes: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The elements of lanes that are outside: of each lane's last byte where its first byte is inside."""
        first, last = self.bytes[lanes] // self.itemsize, (self.bytes[lanes] + self.width - 1) // self.itemsize
        return np.where((first >= 0) & (first < self.size) & (last >= self.size), last, first)


@dataclass(frozen=True)
class Violation:
    """One accessed element outside its tensor.

    Attributes:
        argument, element, size: the element, and the number of elements that the argument spans.
        kind: "load", "store" or "atomic".
        file, line, program, kernel, launch: of the access.
        between: whether the element is between the first and the last element of a view, and belongs to neither.
    """

    argument: str
    element: int
    size: int
    kind: str
    file: str
    line: int
    program: tuple[int, ...]
    kernel: str = ""
    launch: int = 0
    between: bool = False

    def __str__(self) -> str:
        where = f"{describe_source(self.file, self.line)} in {self.kernel}()"
        why = f", {BETWEEN}" if self.between else ""
        element = f"element {self.element} of {self.size}{why}"
        return f"{where}: {self.kind} {self.argument}, {element}, program {describe_program(self.program)}"


def describe_program(program: tuple[int, ...]) -> str:
    """A program as a tuple: "(0,)", "(0, 5)"."""
    return str(tuple(map(int, program)))


def describe_source(file: str, line: int) -> str:
    """File name and line: "kernel.py:15". A notebook's cell, whose file has a name without meaning, is "cell:15"."""
    path = PurePath(file)
    name = "cell" if path.parent.name.startswith("ipykernel_") else path.name
    return f"{name}:{line}"
