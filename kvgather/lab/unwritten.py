"""Memory that nothing wrote: which bytes of a tensor from `torch.empty` a kernel loads before anything stores them.

Defined for tensors that `torch.empty` and its relatives (`empty_like`, `empty_strided`, `new_empty`) make in the body
of a trace. Their bytes are unwritten until one of these writes them:

- a store or an atomic of a kernel in the trace, byte by byte, also through another view of the storage;
- an operation of torch that changes its argument in place, or is given it as `out`: `x[2:] = 1`, `x.copy_(y)`. All
  bytes of that argument count as written.

A load, or an atomic, of an unwritten byte is reported. Limits:

- Other memory counts as written: tensors from before the trace, and results of operations, such as a copy of an
  unwritten tensor.
- Programs run in order. A load of what an earlier program of the same launch stored counts as written, although a GPU
  may run the two the other way around.
- Memory that a tensor shares with NumPy or another library (`x.numpy()`, DLPack) counts as written from then on. An
  extension that writes through a pointer, and is no operation of torch, is not seen: its tensors are reported.
- A lane whose value the kernel discards later, for instance by `tl.where`, is reported, too.
- Operations in other threads are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Unwritten"]

aten = torch.ops.aten
EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
RESHAPING = {
    aten.set_, aten.resize_, aten.resize_as_, aten.as_strided_, aten.detach_, aten.t_, aten.transpose_, aten.squeeze_,
    aten.unsqueeze_, aten.swapaxes_, aten.swapdims_,
}  # fmt: skip
"""Operations in place that write no element."""
SHARED = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


class Unwritten:
    """Context manager that follows which bytes of new, empty tensors are written.

    Each tracked storage has one flag a byte; NumPy's zeros take no memory until a byte is written.

    Args:
        launching: whether a kernel is being launched, when the interpreter copies whole storages.
    """

    def __init__(self, launching: Callable[[], bool] = lambda: False) -> None:
        self.launching = launching
        self._written: dict[int, tuple[StorageWeakRef, NDArray[np.bool_]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Unwritten:
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Shared(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._written.clear()

    def access(
        self, tensor: Tensor, kind: str, offset: NDArray[np.int64], width: int, lanes: NDArray[np.bool_]
    ) -> NDArray[np.bool_] | None:
        """Follow an access of a kernel, before it is executed.

        Args:
            tensor: the argument, as the caller passed it.
            kind: "load", "store" or "atomic".
            offset: each lane's first byte, from the tensor's first element.
            width: bytes per lane.
            lanes: enabled lanes with all bytes in the tensor's storage.

        Returns:
            The lanes that read a byte that nothing wrote; None if there is none.
        """
        written = self._flags(tensor)
        if written is None or not lanes.any():
            return None
        at: NDArray[np.int64] = (
            offset[..., None] + int(tensor.storage_offset()) * tensor.element_size() + np.arange(width)
        )
        found = None
        if kind != "store":
            found = lanes & ~written[np.where(lanes[..., None], at, 0)].all(axis=-1)
        if kind != "load":
            written[at[lanes]] = True
        return found if found is not None and found.any() else None

    def allocated(self, tensor: Tensor) -> None:
        """Follow the storage of a new tensor."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._written = {key: value for key, value in self._written.items() if not value[0].expired()}
            self._written[storage._cdata] = (StorageWeakRef(storage), np.zeros(storage.nbytes(), bool))

    def wrote(self, tensor: Tensor) -> None:
        """Mark the bytes of a tensor's elements as written."""
        written = self._flags(tensor)
        if written is None or not tensor.numel():
            return
        itemsize = tensor.element_size()
        np.lib.stride_tricks.as_strided(
            written[tensor.storage_offset() * itemsize :],
            (*tensor.shape, itemsize),
            (*(stride * itemsize for stride in tensor.stride()), 1),
        )[...] = True

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor's whole storage as written from now on."""
        if self._is_followed(tensor):
            self._written.pop(tensor.untyped_storage()._cdata, None)

    def _flags(self, tensor: Tensor) -> NDArray[np.bool_] | None:
        """The flags of a tensor's storage, or None if it counts as written."""
        if not self._is_followed(tensor):
            return None
        storage = tensor.untyped_storage()
        _, flags = self._written.get(storage._cdata, (None, None))
        if flags is not None and len(flags) != storage.nbytes():  # it was resized
            del self._written[storage._cdata]
            return None
        return flags

    @staticmethod
    def _is_followed(tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_nested


class _Operations(TorchDispatchMode):
    """Tells `memory` which tensors an operation of torch allocates and writes."""

    def __init__(self, memory: Unwritten) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in EMPTY:
            self.memory.allocated(result)
        if func in EMPTY or func.overloadpacket in RESHAPING or self.memory.launching():
            return result
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(value):
                    self.memory.wrote(tensor)
        return result


class _Shared(TorchFunctionMode):
    """Tells `memory` which tensors NumPy or another library may write."""

    def __init__(self, memory: Unwritten) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SHARED and args:
            self.memory.forget(args[0])
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
