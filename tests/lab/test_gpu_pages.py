"""The driver calls of a fence on a GPU, with a fake driver that records them."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch

from kvgather.lab import _gpu_pages
from kvgather.lab._gpu_pages import GpuPages

UNIT, BASE = 2**21, 2**40


class FakeDriver:
    """The part of `cuda.bindings.driver` or hip-python's `hip` that fences call."""

    def __init__(self, prefix: str, fails: str = "") -> None:
        self.calls: list[str] = []
        values = {
            "MemGetAllocationGranularity": UNIT,
            "MemAddressReserve": BASE,
            "MemCreate": "handle",
            **dict.fromkeys(("MemMap", "MemSetAccess", "MemUnmap", "MemRelease", "MemAddressFree")),
        }
        for name, value in values.items():
            setattr(self, prefix + name, self.function(name, value, int(name == fails)))
        flags = SimpleNamespace(
            CU_MEM_ALLOCATION_TYPE_PINNED=1, CU_MEM_LOCATION_TYPE_DEVICE=1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3,
            CU_MEM_ALLOC_GRANULARITY_MINIMUM=0, hipMemAllocationTypePinned=1, hipMemLocationTypeDevice=1,
            hipMemAccessFlagsProtReadWrite=3, hipMemAllocationGranularityMinimum=0,
        )  # fmt: skip
        enums = ("AllocationType", "LocationType", "Access_flags", "AccessFlags", "AllocationGranularity_flags")
        for name in enums:
            setattr(self, f"CUmem{name}", flags)
            setattr(self, f"hipMem{name}", flags)
        self.CUmemAllocationProp = self.hipMemAllocationProp = lambda: SimpleNamespace(location=SimpleNamespace())
        self.CUmemAccessDesc = self.hipMemAccessDesc = lambda: SimpleNamespace(location=SimpleNamespace())
        self.CUdeviceptr = int

    def function(self, name: str, value: object, status: int):
        def call(*arguments):
            self.calls.append(name)
            self.arguments = getattr(self, "arguments", {}) | {name: arguments}
            return (status,) if value is None else (status, value)

        return call


@pytest.fixture(params=["cu", "hip"])
def make(request, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0" if request.param == "hip" else None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())

    def make(fails: str = "") -> FakeDriver:
        driver = FakeDriver(request.param, fails)
        monkeypatch.setattr(_gpu_pages.importlib, "import_module", lambda name: driver)
        return driver

    return make


def test_a_window_ends_or_begins_at_the_edge_of_the_mapping(make):
    driver = make()
    pages = GpuPages(UNIT + 12, 5, 0)
    assert driver.arguments["MemAddressReserve"][:2] == (4 * UNIT, 0)  # two units of memory, a guard on each side
    assert driver.arguments["MemMap"][:2] == (BASE + UNIT, 2 * UNIT)
    for side, address in (("after", BASE + 3 * UNIT - 12), ("before", BASE + UNIT)):
        interface = pages.window(12, side).__cuda_array_interface__
        assert interface["data"] == (address, False)
        assert interface["shape"] == (12,)
        assert interface["typestr"] == "|u1"


def test_memory_is_freed_in_reverse_order_with_the_last_window(make):
    driver = make()
    pages = GpuPages(1, 1, 0)
    window = pages.window(1, "after")
    allocations = list(driver.calls)
    assert allocations == ["MemGetAllocationGranularity", "MemAddressReserve", "MemCreate", "MemMap", "MemSetAccess"]
    del pages
    gc.collect()
    assert driver.calls == allocations
    del window
    gc.collect()
    assert driver.calls[len(allocations) :] == ["MemUnmap", "MemRelease", "MemAddressFree"]


@pytest.mark.parametrize(
    ("fails", "undone"),
    [
        ("MemAddressReserve", []),
        ("MemCreate", ["MemAddressFree"]),
        ("MemMap", ["MemRelease", "MemAddressFree"]),
        ("MemSetAccess", ["MemUnmap", "MemRelease", "MemAddressFree"]),
    ],
)
def test_a_failed_driver_call_is_named_and_earlier_ones_are_undone(make, fails, undone):
    driver = make(fails)
    with pytest.raises(RuntimeError, match=f"{fails} returned 1"):
        GpuPages(1, 1, 0)
    assert driver.calls[driver.calls.index(fails) + 1 :] == undone


def test_the_error_of_a_missing_binding_names_its_package(monkeypatch):
    def missing_module(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(_gpu_pages.importlib, "import_module", missing_module)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ImportError, match=r"cuda-bindings is needed \(No module named 'cuda.bindings.driver'\)"):
        GpuPages(1, 1, 0)
