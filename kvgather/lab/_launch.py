"""A launch with its tensors, the tags that tell their pointers apart, and the recorders that receive accesses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

TAG_SHIFT = np.uint64(56)  # user addresses are below 2^56, which leaves the top byte for the number of the argument
MAX_TAG = 255
BIAS = np.uint64(1 << 55)  # an address below 0 would borrow from the tag; the bias keeps every address positive
ADDRESS_MASK = np.uint64((1 << 56) - 1)


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        number: index of the launch in the trace, from 0.
        kernel: the kernel's name.
        arguments: the kernel's tensor arguments by name, as the interpreter uses them (a CPU copy of a GPU tensor).
        grid: the grid, with as many axes as the caller specified.
        program: index of the current program along each axis.
        originals: the tensors that the caller passed, by name.
    """

    number: int
    kernel: str
    arguments: dict[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    program: tuple[int, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)

    def tag(self, tensor: Tensor) -> int:
        """The tag for the top byte of a tensor's pointer: the argument's number from 1, or 0 for any other tensor."""
        for number, argument in enumerate(self.arguments.values(), start=1):
            if argument is tensor:
                return number if number <= MAX_TAG else 0
        return 0

    def locate(self, tag: int, address: NDArray[np.uint64]) -> tuple[str, NDArray[np.int64]]:
        """The argument with this tag, and byte offsets of tagged addresses from the argument's first element.

        Without such an argument, "" and the addresses.
        """
        if not 1 <= tag <= len(self.arguments):
            return "", address.view(np.int64)
        name, tensor = list(self.arguments.items())[tag - 1]
        start = tagged(tag) + np.uint64(tensor.data_ptr())
        return name, (address - start).view(np.int64)


def tagged(tag: int) -> np.uint64:
    """What to add to an address."""
    return np.uint64((tag << int(TAG_SHIFT)) + int(BIAS))


def untagged(address: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Addresses without their tags; those without a tag are returned as they are."""
    return np.where(address >> TAG_SHIFT == 0, address, (address & ADDRESS_MASK) - BIAS)


def by_tag(address: NDArray[np.uint64], lanes: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The tags of an access with their lanes; a kernel may select between pointers of two arguments, lane by lane.

    Args:
        address: tagged addresses.
        lanes: lanes to execute. If there is none, the result is the first lane's tag and no lane.
    """
    tags = address >> TAG_SHIFT
    present = np.unique(tags[lanes]) if lanes.any() else tags.ravel()[:1]
    for tag in present:
        yield int(tag), lanes & (tags == tag)


def tensors(bound: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a launch's arguments, with names; `x[0]` is the first item of a tuple `x`."""
    for name, value in bound.items():
        if isinstance(value, tuple):
            yield from tensors({f"{name}[{i}]": item for i, item in enumerate(value)})
        elif hasattr(value, "data_ptr"):
            yield name, unwrap(value)
        elif hasattr(value, "base") and hasattr(value.base, "data_ptr"):
            yield name, unwrap(value.base)


def unwrap(value: Any) -> Any:
    """The tensor in Triton's wrapper of a tensor."""
    return value if isinstance(value, Tensor) else getattr(value, "base", value)


HOOKS = {str(Path(__file__).with_name(name)) for name in ("_interpreter.py", "_launch.py", "_unlike_gpu.py")}


def source(package: str) -> tuple[str, int]:
    """File and line of the running kernel, or of its launch: the innermost frame outside triton and the hooks.

    Args:
        package: Triton's folder.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(package) and name not in HOOKS:
            return name, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "", 0


Record = Callable[
    [Launch, str, int, NDArray[np.uint64], int, NDArray[np.bool_], tuple[str, int]], NDArray[np.bool_]
]  # fmt: skip


@dataclass(eq=False)
class Recorder:
    """Receives launches and accesses.

    Attributes:
        launches: the launches so far; the hooks append each one.
        record: called before each access with launch, kind, tag, tagged addresses, width in bytes, lanes and
            (file, line); returns the lanes to skip.
        notes: sentences about launches, such as the configuration of an autotuned kernel, each once.
    """

    launches: list[Launch]
    record: Record
    notes: list[str]
