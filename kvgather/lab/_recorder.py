"""What a trace does with each access: place it, append it, and decide which of its lanes are executed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._launch import Launch
from .access import Access
from .extent import Extent
from .unwritten import Unwritten


class AccessRecorder:
    """Appends accesses to a trace, and decides which lanes are executed.

    Args:
        accesses: the trace's.
        strict, skip_outside: as for `kvgather.lab.trace.trace`; strict is not None.
        memory: follows which memory is written; None if nobody asked.
    """

    def __init__(self, accesses: list[Access], strict: bool, skip_outside: bool, memory: Unwritten | None) -> None:
        self.accesses, self.strict, self.skip_outside, self.memory = accesses, strict, skip_outside, memory
        self._extents: dict[str, Extent] = {}  # of the current launch's arguments
        self._launch = -1

    def record(
        self,
        launch: Launch,
        kind: str,
        tag: int,
        address: NDArray[np.uint64],
        width: int,
        mask: NDArray[np.bool_],
        source: tuple[str, int],
    ) -> NDArray[np.bool_]:
        """Append an access, and return the lanes to skip."""
        argument, offset = launch.locate(tag, address)
        outside = skip = np.zeros(mask.shape, bool)
        between = unwritten = None
        size, itemsize, base = 0, width, 0
        if argument:
            extent = self._extent(launch, argument)
            place = extent.place(offset, width, self.strict)
            outside = mask & (place.outside | place.between)
            skip = mask & ~place.in_storage if self.skip_outside else skip
            between = mask & place.between if place.between.any() else None
            size, itemsize, base = extent.size, extent.itemsize, launch.arguments[argument].data_ptr()
            if self.memory is not None:
                tensor = launch.originals[argument]
                unwritten = self.memory.access(tensor, kind, offset, width, mask & place.in_storage)
        self.accesses.append(
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
                elements=offset // itemsize,
                mask=mask,
                outside=outside,
                size=size,
                itemsize=itemsize,
                base=base,
                between=between,
                unwritten=unwritten,
            )
        )
        return skip

    def _extent(self, launch: Launch, argument: str) -> Extent:
        if launch.number != self._launch:
            self._extents, self._launch = {}, launch.number
        if argument not in self._extents:
            self._extents[argument] = Extent(launch.arguments[argument])
        return self._extents[argument]
