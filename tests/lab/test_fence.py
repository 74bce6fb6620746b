"""Fences: the guard is adjacent to the tensor, the first byte outside faults, and all memory is freed."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from kvgather.lab import _gpu_pages, fence
from kvgather.lab.fence import FenceError, fenced

needs_mprotect = pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.bool, torch.int64]


def protection(address: int) -> str:
    """The permissions of the mapping at an address, such as "rw-p"; "" for an unmapped address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return line.split()[1]
    return ""


@needs_proc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (5000,)])
@pytest.mark.parametrize("side", fence.SIDES)
def test_values_are_kept_and_the_guard_is_adjacent(dtype, shape, side):
    value = (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
    copy = fenced(value, side=side)
    assert copy.dtype == dtype
    assert copy.shape == value.shape
    assert torch.equal(copy.float(), value.float())
    first, last = copy.data_ptr(), copy.data_ptr() + copy.numel() * copy.element_size() - 1
    assert protection(first).startswith("rw")
    assert protection(last).startswith("rw")
    outside = last + 1 if side == "after" else first - 1
    assert protection(outside).startswith("---")
    assert protection(outside + (1 if side == "after" else -1) * (fence.GUARD_BYTES - 1)).startswith("---")


@needs_mprotect
def test_numbers_strides_and_gradients():
    assert torch.equal(fenced(0.5), torch.tensor([0.5]))
    strided = torch.arange(12).reshape(3, 4).T
    assert torch.equal(fenced(strided), strided)
    assert fenced(strided).is_contiguous()
    assert not fenced(torch.ones(2, requires_grad=True)).requires_grad


VIEWS = {
    "gaps": torch.arange(48.0).view(4, 3, 4)[1:3, :2, 1:3],
    "transposed": torch.arange(12).view(3, 4).T,
    "expanded": torch.tensor([[2.0], [3.0]]).expand(2, 5),
    "windows": torch.arange(10.0).unfold(0, 4, 2),
    "conjugate": torch.view_as_complex(torch.arange(24.0).view(3, 4, 2)).conj()[:, ::2],
    "negative": torch.view_as_complex(torch.arange(24.0).view(3, 4, 2)).conj().imag[:, 1:],
    "scalar": torch.tensor(7),
}


@needs_proc
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("side", fence.SIDES)
def test_strides_are_kept_with_the_bytes_of_the_gaps(name, side):
    value = VIEWS[name]
    copy = fenced(value, side=side, keep_strides=True)
    assert torch.equal(copy, value) and copy.stride() == value.stride() and copy.dtype == value.dtype
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    memory = [tensor.as_strided((span,), (1,)) for tensor in (copy, value)]
    assert torch.equal(*memory)
    first, end = copy.data_ptr(), copy.data_ptr() + span * copy.element_size()
    assert protection(first).startswith("rw") and protection(end - 1).startswith("rw")
    assert protection(end if side == "after" else first - 1).startswith("---")
    assert fenced(value, side=side).is_contiguous()


@needs_mprotect
def test_strides_of_a_number_and_of_an_empty_tensor():
    assert fenced(0.5, keep_strides=True).stride() == (1,)
    empty = torch.zeros(4, 0, 6)[::2, :, ::2]
    assert fenced(empty, keep_strides=True).stride() == empty.stride()
    assert fenced(empty).shape == empty.shape


def test_no_elements():
    empty = fenced(torch.zeros(0, 3, dtype=torch.float16))
    assert empty.shape == (0, 3)
    assert empty.data_ptr() == 0


@needs_proc
def test_the_mapping_is_freed_with_the_last_view():
    first = fenced(torch.arange(8.0))
    address = first.data_ptr()
    view = first[4:].view(torch.int32)
    del first
    gc.collect()
    assert protection(address).startswith("rw")
    assert view.shape == (4,)
    del view
    gc.collect()
    assert protection(address) == ""


@needs_mprotect
@pytest.mark.parametrize("side", fence.SIDES)
@pytest.mark.parametrize("outside", [False, True])
def test_the_first_byte_outside_kills_the_process(side, outside):
    code = f"""
import ctypes, torch
from kvgather.lab.fence import fenced
t = fenced(torch.zeros(3, dtype=torch.uint8), side={side!r})
inside, step = (t.data_ptr() + 2, 1) if {side!r} == "after" else (t.data_ptr(), -1)
print(ctypes.c_uint8.from_address(inside + step * {int(outside)}).value)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert child.returncode == (-11 if outside else 0), child.stderr
    assert child.stdout == ("" if outside else "0\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": "left"}, "side is 'left'; accepted: 'after', 'before'"),
        ({"guard_bytes": 0}, "guard_bytes is 0; accepted: 1 to 70368744177664"),
        ({"guard_bytes": -(10**5000)}, "guard_bytes is of too many digits to print; accepted: 1 to "),
        ({"side": []}, r"side is list \[\]; accepted: 'after', 'before'"),
        ({"side": np.array(["after", "before"])}, "side is ndarray array.*; accepted: 'after', 'before'"),
        ({"side": torch.zeros(2)}, r"side is Tensor of shape \[2\]; accepted: 'after', 'before'"),
        ({"device": "meta"}, "device is meta; accepted"),
        ({"device": "after"}, r"device is 'after', which is a side; write fenced\(value, side='after'\)"),
        ({"device": "before", "side": "after"}, r"which is a side; write fenced\(value, side='before'\)"),
        ({"device": "after", "side": "cuda"}, r"is a side; write fenced\(value, device='cuda', side='after'\)"),
        ({"side": "cuda:1"}, r"side is 'cuda:1', which is a device; write fenced\(value, device='cuda:1'\)"),
        ({"side": torch.device("cpu")}, r"which is a device; write fenced\(value, device='cpu'\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(FenceError, match=message):
        fenced(torch.ones(1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"value": None}, TypeError, "value is NoneType None; accepted: a tensor or a number"),
        ({"value": "x"}, TypeError, "value is str 'x'; accepted: a tensor or a number"),
        ({"value": [1.0]}, TypeError, r"value is list \[1.0\]; accepted: a tensor or a number"),
        ({"value": 1e300}, ValueError, r"value is 1e\+300; accepted: numbers that FP32 can hold"),
        ({"value": 10**400}, ValueError, r"value is 10000.*; accepted: numbers that FP32 can hold"),
        ({"value": torch.ones(2, device="meta")}, ValueError, "value is on meta, which holds no values; accepted"),
        ({"value": torch.ones(2).to_sparse()}, ValueError, "value has layout torch.sparse_coo; accepted: a dense"),
        ({"guard_bytes": 1.5}, TypeError, "guard_bytes is float 1.5; accepted: an int"),
        ({"guard_bytes": None}, TypeError, "guard_bytes is NoneType None; accepted: an int"),
        ({"device": 0}, TypeError, "device is int 0; accepted: a torch.device or its name"),
        ({"keep_strides": 1}, TypeError, "keep_strides is int 1; accepted: True, False"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'; accepted: a torch.device or its name"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, error, message):
    with pytest.raises(error, match=message):
        fenced(**{"value": torch.ones(1), **arguments})


@needs_mprotect
def test_conjugate_views_and_numpy_numbers_are_copied_by_value():
    view = torch.tensor([1 + 1j, 1 + 2j]).conj()
    assert fenced(view).equal(view.resolve_conj()) and fenced(view.imag).tolist() == [-1, -2]
    assert fenced(np.float32(0.5)).equal(torch.tensor([0.5])) and fenced(3).equal(torch.tensor([3.0]))
    assert fenced(float("nan")).isnan().all() and fenced(float("-inf")).tolist() == [float("-inf")]
    assert fenced(1.0, guard_bytes=np.int64(4096)).shape == (1,)


@needs_mprotect
def test_a_failed_mapping_is_reported(monkeypatch):
    def failing_mmap(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(fence.mmap, "mmap", failing_mmap)
    with pytest.raises(FenceError, match="guard_bytes is 67108864, and no memory was mapped: Cannot allocate memory"):
        fenced(1.0)


def test_a_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FenceError, match="device is cuda, and torch sees no GPU here"):
        fenced(torch.ones(1), "cuda")
    with pytest.raises(FenceError, match="device is cuda:3, and torch sees no GPU here"):
        fenced(torch.ones(0), "cuda:3")


def test_a_missing_driver_binding_is_reported(monkeypatch):
    def missing_binding(*args: object) -> None:
        raise ImportError("the package cuda-bindings is needed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(fence, "GpuPages", missing_binding)
    with pytest.raises(FenceError, match="a fence on cuda cannot be built: the package cuda-bindings is needed"):
        fenced(torch.ones(1), "cuda")


@pytest.fixture
def driver_calls(monkeypatch):
    """Successful driver calls of this process by name; other processes also change the amount of free memory."""
    calls: Counter[str] = Counter()
    driver_call = _gpu_pages._Driver.__call__

    def counting_call(self, name, *arguments):
        value = driver_call(self, name, *arguments)
        calls[name] += 1
        return value

    monkeypatch.setattr(_gpu_pages._Driver, "__call__", counting_call)
    return calls


@pytest.mark.gpu
@pytest.mark.parametrize("side", fence.SIDES)
def test_values_are_kept_on_a_gpu_and_memory_is_freed(side, driver_calls):
    value = torch.randn(3, 5).to(torch.float8_e4m3fn)
    copies = [fenced(value, "cuda", side) for _ in range(8)]
    assert all(torch.equal(copy.cpu().float(), value.float()) for copy in copies)
    end = copies[0].data_ptr() + (15 if side == "after" else 0)
    assert end % 4096 == 0
    allocations = ("MemAddressReserve", "MemCreate", "MemMap")
    assert [driver_calls[name] for name in allocations] == [8, 8, 8] and not driver_calls["MemRelease"]
    del copies
    gc.collect()
    assert [driver_calls[name] for name in ("MemUnmap", "MemRelease", "MemAddressFree")] == [8, 8, 8]
