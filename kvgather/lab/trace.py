"""Every load and store of a Triton kernel: the bytes that a program accesses, and those outside their tensor.

A general tool. A trace runs kernels in Triton's interpreter, on machines with and without a GPU, and records each
access with its source line, its argument and its program:

    from kvgather.lab.trace import trace

    with trace() as t:
        my_kernel[grid](x, scale, out)
    print(t.report())  # kernel.py:93 in my_kernel(): load scale, elements 1–656 of 1, first program (0, 5)

`kvgather trace SCRIPT.py` does the same for a whole script, unchanged.

An access belongs to the argument that its address was computed from, even if the address is inside another tensor:
while the kernel runs, the top byte of each pointer contains the number of its argument. A pointer that a kernel loads
from memory has no such number; its accesses are recorded without an argument, counted, and not checked.

A flagged access is executed as in a run without a trace, if its bytes are in the storage of the argument. An access
outside the storage is skipped (a load gives 0), so that the process survives and the trace contains all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..device import interpreted_meanwhile
from ._checked import TraceError
from ._interpreter import hooked, launching
from ._launch import Launch, Recorder
from ._recorder import AccessRecorder
from ._unlike_gpu import InterpreterWarning
from .access import Access, Violation
from .groups import Group, group, lines, races
from .unwritten import Unwritten

__all__ = ["Access", "Group", "InterpreterWarning", "Launch", "Trace", "TraceError", "Violation", "trace"]


@dataclass
class Trace:
    """The launches in the body of `trace()`, and their accesses.

    Attributes:
        accesses: in the order of execution.
        launches: in the order of execution.
        notes: what differs from a run on a GPU, each sentence once: the configuration of an autotuned kernel, and what
            Triton's interpreter computes wrongly.
    """

    accesses: list[Access] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[Violation]:
        """Accessed elements outside their tensor, in the order of execution, one for each lane."""
        found = []
        for a in self.accesses:
            if a.outside.any():
                gaps = a.between[a.outside] if a.between is not None else np.zeros(int(a.outside.sum()), bool)
                for element, gap in zip(a.flagged(a.outside).tolist(), gaps.tolist(), strict=True):
                    where = a.argument, element, a.size, a.kind, a.file, a.line, a.program
                    found.append(Violation(*where, kernel=a.kernel, launch=a.launch, between=gap))
        return found

    @property
    def groups(self) -> list[Group]:
        """The violations by kernel, argument, source line, kind and launch, in the order of execution.

        Elements before or behind the argument, and elements between those of a view, are separate groups.
        """
        outside = group(self.accesses, lambda a: a.outside if a.between is None else a.outside & ~a.between, "outside")
        between = group(self.accesses, lambda a: a.between, "between")
        return sorted([*outside, *between], key=lambda found: found.launch)

    @property
    def races(self) -> list[Group]:
        """Elements that two different programs of one launch store, grouped like `groups`.

        The interpreter runs programs in order, so that the last one wins; a GPU runs them in any order. Atomics are no
        race. Stores that kernels order by a lock are reported, too. Stores outside their tensor are not.
        """
        return races(self.accesses)

    @property
    def unwritten(self) -> list[Group]:
        """Loads and atomics of memory that nothing wrote, grouped like `groups`; see `kvgather.lab.unwritten`.

        Empty unless the trace was asked for them.
        """
        return group(self.accesses, lambda a: a.unwritten, "unwritten")

    @property
    def unchecked(self) -> int:
        """Number of accesses through pointers that a kernel loaded from memory."""
        return sum(not access.argument for access in self.accesses)

    def report(self, limit: int | None = 20) -> str:
        """The findings, a line for each source line and argument: violations, races, reads of unwritten memory.

        Without violations, the first line is "no access outside its tensor" with the number of accesses and launches.
        The notes, and the number of accesses that were not checked, are at the end.

        Args:
            limit: lines of each kind to print before "and N more"; None for all.
        """
        count, launches, violations = len(self.accesses), len(self.launches), self.groups
        text = [] if violations else [f"no access outside its tensor; accesses: {count}, launches: {launches}"]
        for found in (violations, self.races, self.unwritten):
            section = lines(found, several_launches=launches > 1)
            shown = section if limit is None else section[:limit]
            text += shown
            if len(section) > len(shown):
                text.append(f"and {len(section) - len(shown)} more")
        if self.unchecked:
            text.append(f"{self.unchecked} of {count} accesses not checked: their pointers were loaded from memory")
        return "\n".join([*text, *(f"note: {note}" for note in self.notes)])

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
def trace(*, strict: bool | None = None, skip_outside: bool = True, unwritten: bool = False) -> Iterator[Trace]:
    """Context manager that runs Triton kernels in the interpreter and records their loads, stores and atomics.

    In its body, kernels that were decorated for a GPU run in the interpreter too; the interpreter copies their tensors
    to the CPU and back. An autotuned kernel runs with its first configuration. Nested traces each record everything.

    Args:
        strict: whether an element between the first and the last element of an argument that is not part of it
            counts as outside. None and True check every argument that is a view with gaps (in other tensors, nothing
            is between). False counts the whole range from first to last as inside.
        skip_outside: whether to skip accesses outside the storage of their argument: loads give 0, stores have no
            effect. False executes them, which may crash the process.
        unwritten: whether to record loads of memory that nothing wrote. It applies to tensors that
            `torch.empty` and its relatives make in the body; see `kvgather.lab.unwritten`.

    Yields:
        A `Trace`, to which each kernel appends its accesses.

    Raises:
        TraceError: triton is missing, this module cannot hook its interpreter, or another thread is tracing.

    Warns:
        InterpreterWarning: Triton's interpreter computes what a kernel asks for differently from a GPU.
    """
    result = Trace()
    memory = Unwritten(launching) if unwritten else None
    recorder = AccessRecorder(result.accesses, strict is not False, skip_outside, memory)
    with ExitStack() as stack:
        stack.enter_context(interpreted_meanwhile())
        stack.enter_context(hooked(Recorder(result.launches, recorder.record, result.notes)))
        if memory is not None:
            stack.enter_context(memory)
        yield result
