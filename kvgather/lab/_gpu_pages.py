"""Device memory with unmapped addresses on both sides, through the driver's virtual memory management.

CUDA and HIP name the functions alike but for a prefix: `cuMemMap`, `hipMemMap`.
"""

from __future__ import annotations

import importlib
import math
import weakref
from typing import Any

import torch


class _Driver:
    """One interface to `cuda.bindings.driver` and to hip-python's `hip`."""

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
        """The allocation properties of pinned memory on GPU `index`."""
        m = self.module
        if self.hip:
            properties = m.hipMemAllocationProp()
            properties.type = m.hipMemAllocationType.hipMemAllocationTypePinned
            properties.location.type = m.hipMemLocationType.hipMemLocationTypeDevice
        else:
            properties = m.CUmemAllocationProp()
            properties.type = m.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            properties.location.type = m.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = index
        return properties

    def set_access(self, address: int, nbytes: int, properties: Any) -> None:
        """Give the GPU that owns the memory read and write access."""
        m = self.module
        if self.hip:
            access = m.hipMemAccessDesc()
            access.location.type, access.location.id = properties.location.type, properties.location.id
            access.flags = m.hipMemAccessFlags.hipMemAccessFlagsProtReadWrite
            self("MemSetAccess", address, nbytes, access, 1)
        else:
            access = m.CUmemAccessDesc()
            access.location = properties.location
            access.flags = m.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            self("MemSetAccess", m.CUdeviceptr(address), nbytes, [access], 1)

    def pointer(self, address: int) -> Any:
        return address if self.hip else self.module.CUdeviceptr(address)


class GpuPages:
    """One mapping in the middle of a larger range of reserved addresses.

    Args:
        nbytes: bytes to map, rounded up to the driver's granularity (2 MiB on most GPUs).
        guard_bytes: bytes of address space that stay unmapped on each side, rounded up to the same granularity.
        index: index of the GPU.

    Raises:
        ImportError: the Python binding of the driver is missing.
        RuntimeError: a driver call failed.
    """

    def __init__(self, nbytes: int, guard_bytes: int, index: int) -> None:
        driver = _Driver()
        torch.cuda.synchronize(index)  # creates the GPU's primary context
        with torch.cuda.device(index):
            properties = driver.properties(index)
            minimum = (
                driver.module.hipMemAllocationGranularity_flags.hipMemAllocationGranularityMinimum
                if driver.hip
                else driver.module.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            )
            unit = int(driver("MemGetAllocationGranularity", properties, minimum))
            self.size, guard = (math.ceil(n / unit) * unit for n in (nbytes, guard_bytes))
            reserved = self.size + 2 * guard
            base = int(driver("MemAddressReserve", reserved, 0, driver.pointer(0), 0))
            self.address = base + guard
            undo: list[tuple[Any, ...]] = [("MemAddressFree", driver.pointer(base), reserved)]
            try:
                handle = driver("MemCreate", self.size, properties, 0)
                undo.insert(0, ("MemRelease", handle))
                driver("MemMap", driver.pointer(self.address), self.size, 0, handle, 0)
                undo.insert(0, ("MemUnmap", driver.pointer(self.address), self.size))
                driver.set_access(self.address, self.size, properties)
            except RuntimeError:
                _free(driver, undo, index)
                raise
        weakref.finalize(self, _free, driver, undo, index)

    def window(self, nbytes: int, side: str) -> _Window:
        """The last `nbytes` of the mapping (side "after") or its first (side "before")."""
        return _Window(self, self.address + (self.size - nbytes if side == "after" else 0), nbytes)


class _Window:
    """A range of the mapping as uint8. A tensor over the window keeps the window alive, and the window the mapping."""

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
    """Free mapping and addresses after every kernel has finished; a dead context has no memory to free."""
    try:
        torch.cuda.synchronize(index)
        for call in undo:
            driver(*call)
    except RuntimeError:
        pass
