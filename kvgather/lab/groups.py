"""Findings of a trace, grouped: one group is one source line that accesses one argument wrongly in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .access import BETWEEN, Access, describe_program, describe_source

__all__ = ["Group", "group", "lines", "races"]

SHOWN = 3
"""Runs of elements that a line shows before "…"."""


@dataclass(frozen=True, eq=False)
class Group:
    """Accesses of one source line to one argument in one launch, with the same thing wrong.

    Attributes:
        kernel, argument, file, line, kind, launch: as in `Access`.
        reason: "outside" (before the first or behind the last element), "between" (between a view's elements), "race"
            (stored by two programs) or "unwritten" (loaded, and nothing wrote it).
        elements: int64, sorted, each once.
        size: elements that the argument spans, from its first to its last.
        programs: the programs, in the order of execution. In a race, those of the other store too.
    """

    kernel: str
    argument: str
    file: str
    line: int
    kind: str
    launch: int
    reason: str
    elements: NDArray[np.int64]
    size: int
    programs: tuple[tuple[int, ...], ...]

    @property
    def site(self) -> tuple[str, str, str, int, str, str]:
        """What two launches of a kernel have in common."""
        return self.kernel, self.argument, self.file, self.line, self.kind, self.reason

    def __str__(self) -> str:
        return _line([self])


def group(accesses: Iterable[Access], lanes: Callable[[Access], NDArray[np.bool_] | None], reason: str) -> list[Group]:
    """Groups of the accesses with at least one of these lanes, in the order of execution.

    Args:
        accesses: in the order of execution.
        lanes: the lanes of an access that are wrong; None for none.
        reason: why.
    """
    found: dict[Any, list[tuple[Access, NDArray[np.int64]]]] = {}
    for access in accesses:
        wrong = lanes(access)
        if wrong is not None and wrong.any():
            found.setdefault(_key(access), []).append((access, access.flagged(wrong)))
    return [
        _group(members[0][0], reason, [elements for _, elements in members], [access.program for access, _ in members])
        for members in found.values()
    ]


def _key(access: Access) -> Any:
    return access.kernel, access.argument, access.file, access.line, access.kind, access.launch


def _group(
    first: Access, reason: str, elements: Sequence[NDArray[np.int64]], programs: Iterable[tuple[int, ...]]
) -> Group:
    return Group(
        kernel=first.kernel,
        argument=first.argument,
        file=first.file,
        line=first.line,
        kind=first.kind,
        launch=first.launch,
        reason=reason,
        elements=np.unique(np.concatenate([part.ravel() for part in elements])),
        size=first.size,
        programs=tuple(dict.fromkeys(programs)),
    )


def races(accesses: Sequence[Access]) -> list[Group]:
    """Groups of the elements that two programs of one launch store. A group has the line of the later store."""
    launches: dict[int, list[Access]] = {}
    for access in accesses:
        if access.kind == "store" and access.mask.any():
            launches.setdefault(access.launch, []).append(access)
    return [found for stores in launches.values() for found in _races(stores)]


def _races(stores: list[Access]) -> list[Group]:
    """The races among the stores of one launch, in the order of execution."""
    numbers: dict[tuple[int, ...], int] = {}
    programs = np.array([numbers.setdefault(store.program, len(numbers)) for store in stores])
    if len(numbers) < 2:
        return []
    address, index = _stored(stores)
    order = np.lexsort((index, address))  # by address, then in the order of execution
    address, index = address[order], index[order]
    again = np.flatnonzero((address[1:] == address[:-1]) & (programs[index[1:]] != programs[index[:-1]])) + 1
    again = again[np.argsort(index[again], kind="stable")]
    address, earlier, later = address[again], index[again - 1], index[again]
    base, itemsize = (np.array([getattr(store, name) for store in stores]) for name in ("base", "itemsize"))
    elements = (address - base[later]) // itemsize[later]
    keys: dict[Any, int] = {}
    number = np.array([keys.setdefault(_key(store), len(keys)) for store in stores])[later]
    found = []
    for wanted in dict.fromkeys(number.tolist()):
        mine = number == wanted
        pairs = np.stack([earlier[mine], later[mine]], axis=1).ravel().tolist()  # two stores of one address
        programs_of_pairs = [stores[i].program for i in dict.fromkeys(pairs)]
        found.append(_group(stores[pairs[1]], "race", [elements[mine]], programs_of_pairs))
    return found


def _stored(stores: list[Access]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The addresses that stores inside their tensors write, and the index of the store that writes each.

    One address stands for a lane if all stores are aligned and equally wide, for a byte otherwise.
    """
    firsts = [np.unique(store.base + store.bytes[store.mask & ~store.outside]) for store in stores]
    width = stores[0].width
    aligned = all(s.width == width and not (first % width).any() for s, first in zip(stores, firsts, strict=True))
    if not aligned:
        firsts = [
            np.unique(first[:, None] + np.arange(s.width)) for s, first in zip(stores, firsts, strict=True)
        ]  # fmt: skip
    return np.concatenate(firsts), np.repeat(np.arange(len(stores)), [len(first) for first in firsts])


def lines(groups: Iterable[Group], several_launches: bool) -> list[str]:
    """One line for each site, over all launches.

    Args:
        groups: in the order of execution.
        several_launches: whether the trace has more than one launch, so that a line names its own.
    """
    sites: dict[Any, list[Group]] = {}
    for found in groups:
        sites.setdefault(found.site, []).append(found)
    result = []
    for members in sites.values():
        where = f" of launch {members[0].launch}" if several_launches else ""
        if len(members) > 1:
            where += f", in {len(members)} launches"
        result.append(_line(members) + where)
    return result


def _line(groups: Sequence[Group]) -> str:
    """The groups of one site in one line, up to the first program."""
    first = groups[0]
    elements = np.unique(np.concatenate([g.elements for g in groups]))
    sizes = sorted({g.size for g in groups})
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    subject = first.argument or "a pointer from memory"
    text = f"{describe_source(first.file, first.line)} in {first.kernel}(): {first.kind} {subject}, {runs(elements)}"
    text += f" of {size}" if first.argument else ""
    text += {"outside": "", "between": f", {BETWEEN}", "race": "", "unwritten": ", which nothing wrote"}[first.reason]
    if first.reason == "race":
        count = len(first.programs)
        named = " and ".join(describe_program(program) for program in first.programs[:2])
        return f"{text}, stored by {count} programs, first {named}"
    return f"{text}, first program {describe_program(first.programs[0])}"


def runs(elements: NDArray[np.int64]) -> str:
    """Elements as text: "element 7", "elements 0–3 and 8", "elements 1, 3, 5, …, 63 (32 elements)".

    Args:
        elements: sorted, each once.
    """
    breaks = np.flatnonzero(np.diff(elements) != 1)
    first = [int(elements[i]) for i in (0, *(breaks + 1))]
    last = [int(elements[i]) for i in (*breaks, len(elements) - 1)]
    texts = [f"{a}" if a == b else f"{a}–{b}" if a >= 0 else f"{a} to {b}" for a, b in zip(first, last, strict=True)]
    if len(elements) == 1:
        return f"element {texts[0]}"
    if len(texts) > SHOWN + 1:
        return f"elements {', '.join(texts[:SHOWN])}, …, {texts[-1]} ({len(elements)} elements)"
    return f"elements {' and '.join(filter(None, [', '.join(texts[:-1]), texts[-1]]))}"
