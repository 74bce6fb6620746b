"""One bug of the hunt: a user's report, the code, geometries, the right answers, and what every tool says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

__all__ = ["TOOLS", "Bug", "Thread", "geometry_label"]

TOOLS = {
    "oracle": "the result under a trace, compared with plain torch",
    "poison": "the same with NaN in the slots that no token owns, if the inputs have such slots",
    "report": "a trace's report without the gaps of views (strict=False): accesses before a tensor or behind it",
    "strict": "a trace's report: also accesses between the elements of a view",
    "writers": "a trace's report: elements that two programs store",
    "fence": "a run without a trace, with memory that faults behind every tensor",
}
"""What a reader can ask, in the order of the chapter's last table."""

Geometry = dict[str, Any]
"""The arguments of a kernel module's `inputs`."""


@dataclass(frozen=True)
class Thread:
    """A public thread about a bug of this kind.

    Attributes:
        place: "owner/repository#number".
        status: "merged", "open" or "closed", as last read, with a word more where that is needed.
    """

    place: str
    status: str

    @property
    def url(self) -> str:
        """GitHub forwards the address of an issue to a pull request of the same number."""
        repository, _, number = self.place.partition("#")
        return f"https://github.com/{repository}/issues/{number}"

    def __str__(self) -> str:
        return f"{self.place} ({self.status})"


@dataclass(frozen=True)
class Bug:
    """A bug and all that a reader, a check and a chapter need of it.

    Attributes:
        name: the name of its module in `kvgather.lab.hunt.kernels`.
        title, report: what its user says; the cause is in neither.
        difficulty: 1 (easy) to 4.
        family: the cause in a few words.
        threads: public threads about bugs of this kind; the kernel is a model of our own.
        module: the kernel's module, with `inputs` and `oracle`.
        launcher, kernels: the names of the launcher, and of the kernels that it launches, in the module.
        passes: geometries in which the result is right.
        shows: the geometry that shows the bug; the three questions are about it.
        also: other geometries that show it, for the script.
        unpoisoned: `shows` with zeros in the slots that no token owns; None unless `shows` has NaN there.
        poisoned: `shows` with NaN in these slots; None where `shows` has it already, or the inputs have no such slots.
        hidden: geometries of the check, beside `shows`.
        tight: whether the script puts every tensor at the end of its memory, as an allocator may.
        uncopied: inputs of the size of a pool, which a launcher must not copy.
        tolerance: largest accepted error of the result, relative (absolute below 1).
        arguments, lines, programs: the accepted answers to the three questions; a line is its text.
        near: what to say to a wrong answer that has a reason, by answer.
        ignored: what to say to a type in a kernel's signature that is a fix on a GPU only, by "argument: type".
        hints: three, each says more.
        found_by: the tools of `TOOLS` that show the bug in the geometry `shows`.
        why: why these, and why the others are silent.
        fix: the right fix in words.
        wrong_fixes: fixes in words that look right.
        lesson: what to take home.
    """

    name: str
    title: str
    report: str
    difficulty: int
    family: str
    threads: tuple[Thread, ...]
    module: ModuleType
    launcher: str
    kernels: tuple[str, ...]
    passes: tuple[Geometry, ...]
    shows: Geometry
    hidden: tuple[Geometry, ...]
    arguments: tuple[str, ...]
    lines: tuple[str, ...]
    programs: tuple[tuple[int, ...], ...]
    hints: tuple[str, str, str]
    found_by: tuple[str, ...]
    why: str
    fix: str
    wrong_fixes: tuple[str, ...]
    lesson: str
    also: tuple[Geometry, ...] = ()
    unpoisoned: Geometry | None = None
    poisoned: Geometry | None = None
    near: Mapping[Any, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    tight: bool = False
    uncopied: tuple[str, ...] = ()
    tolerance: float = 0.0

    @property
    def functions(self) -> tuple[Any, ...]:
        """The kernels, as the module defines them."""
        return tuple(getattr(self.module, name) for name in self.kernels)

    def inputs(self, geometry: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The launcher's arguments for a geometry, by default for the one that shows the bug."""
        return dict(self.module.inputs(**(self.shows if geometry is None else geometry)))

    def expected(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The right contents of the tensors that the launcher fills, by name, from inputs before a launch."""
        return dict(self.module.oracle(**inputs))

    def run(self, inputs: Mapping[str, Any], *functions: Any) -> None:
        """Launch on inputs, with the bug, or with kernels or a launcher instead.

        Args:
            inputs: the launcher's arguments in order; its outputs are filled.
            functions: nothing; or kernels in the order of `kernels`; or one launcher, a plain Python function.
        """
        if len(functions) == 1 and isinstance(functions[0], FunctionType):
            functions[0](*inputs.values())
        else:
            getattr(self.module, self.launcher)(*inputs.values(), *functions)


def geometry_label(geometry: Mapping[str, Any]) -> str:
    """A geometry in one line, such as "n = 21, page_size = 4"."""
    return ", ".join(f"{name} = {value}" for name, value in geometry.items())
