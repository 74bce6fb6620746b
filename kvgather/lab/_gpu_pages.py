"""Device memory with nothing mapped on either side of it, through the driver's virtual memory management.

CUDA's names are written out; HIP has the same functions under its own prefix.
"""

from __future__ import annotations

import importlib
import math
import weakref
from typing import Any

import torch


class _Driver:
    """`cuda.bindings.driver`, or hip-python's `hip`, called the same way."""

    def __init__(self) -> None:
        self.hip = torch.version.hip is not None
        package, install = ("hip.hip", "hip-python") if self.hip else ("cuda.bindings.driver", "cuda-bindings")
        try:
            self.module: Any = importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"the package {install} is needed ({error}); install it with pip") from error

    def __call__(self, name: str, *args: Any) -> Any:
        """Call `cuMem…` or `hipMem…` and return its value; RuntimeError when the driver reports an error."""
        name = ("hip" if self.hip else "cu") + name
        status, *values = getattr(self.module, name)(*args)
        if int(status) != 0:
            raise RuntimeError(f"{name} returned {status}")
        return values[0] if values else None

    def properties(self, index: int) -> Any:
        """What to allocate: pinned memory of GPU `index`."""
        m = self.module
        if self.hip:
            wanted = m.hipMemAllocationProp()
            wanted.type = m.hipMemAllocationType.hipMemAllocationTypePinned
            wanted.location.type = m.hipMemLocationType.hipMemLocationTypeDevice
        else:
            wanted = m.CUmemAllocationProp()
            wanted.type = m.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            wanted.location.type = m.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = index
        return wanted

    def set_access(self, address: int, nbytes: int, wanted: Any) -> None:
        """Let the GPU that owns the memory read and write it."""
        m = self.module
        if self.hip:
            access = m.hipMemAccessDesc()
            access.location.type, access.location.id = wanted.location.type, wanted.location.id
            access.flags = m.hipMemAccessFlags.hipMemAccessFlagsProtReadWrite
            self("MemSetAccess", address, nbytes, access, 1)
        else:
            access = m.CUmemAccessDesc()
            access.location = wanted.location
            access.flags = m.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            self("MemSetAccess", m.CUdeviceptr(address), nbytes, [access], 1)

    def pointer(self, address: int) -> Any:
        return address if self.hip else self.module.CUdeviceptr(address)


class GpuPages:
    """One mapping in the middle of a larger range of reserved addresses.

    Args:
        nbytes: how much memory is wanted; rounded up to the driver's granularity (2 MiB on most GPUs).
        guard_bytes: how much address space is kept unmapped on each side; rounded up the same way.
        index: of the GPU.

    Raises:
        ImportError: the Python binding of the driver is missing.
        RuntimeError: the driver refused.
    """

    def __init__(self, nbytes: int, guard_bytes: int, index: int) -> None:
        driver = _Driver()
        torch.cuda.synchronize(index)  # makes the GPU's primary context exist
        with torch.cuda.device(index):
            wanted = driver.properties(index)
            granularities = (
                driver.module.hipMemAllocationGranularity_flags.hipMemAllocationGranularityMinimum
                if driver.hip
                else driver.module.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            )
            unit = int(driver("MemGetAllocationGranularity", wanted, granularities))
            self.size, guard = (math.ceil(n / unit) * unit for n in (nbytes, guard_bytes))
            reserved = self.size + 2 * guard
            base = int(driver("MemAddressReserve", reserved, 0, driver.pointer(0), 0))
            self.address = base + guard
            undo: list[tuple[Any, ...]] = [("MemAddressFree", driver.pointer(base), reserved)]
            try:
                handle = driver("MemCreate", self.size, wanted, 0)
                undo.insert(0, ("MemRelease", handle))
                driver("MemMap", driver.pointer(self.address), self.size, 0, handle, 0)
                undo.insert(0, ("MemUnmap", driver.pointer(self.address), self.size))
                driver.set_access(self.address, self.size, wanted)
            except RuntimeError:
                _free(driver, undo, index)
                raise
        weakref.finalize(self, _free, driver, undo, index)

    def window(self, nbytes: int, side: str) -> _Window:
        """The last `nbytes` of the mapping (side "after") or its first (side "before")."""
        return _Window(self, self.address + (self.size - nbytes if side == "after" else 0), nbytes)


class _Window:
    """Some bytes of the pages as uint8; the tensor made from it keeps it, and it keeps the pages."""

    def __init__(self, pages: GpuPages, address: int, nbytes: int) -> None:
        self.pages = pages
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _free(driver: _Driver, undo: list[tuple[Any, ...]], index: int) -> None:
    """Give everything back once no kernel can still be using it; after a crash the context is gone anyway."""
    try:
        torch.cuda.synchronize(index)
        for call in undo:
            driver(*call)
    except RuntimeError:
        pass
