"""What tensors held before a call, to see what the call changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvgather import GatherPlan, PagedKVCache, PrefixBatch
from tests.fuzz.case import Wrong

MOST_BYTES = 1 << 22
"""A larger storage is not copied: such a tensor is given for its size."""


def has_memory(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_nested
        and not value.is_meta
        and not value.is_quantized
    )


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors with memory in an argument: itself, those of a sequence, a cache, a plan or a batch."""
    if isinstance(value, Tensor):
        if has_memory(value):
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, PagedKVCache):
        yield from tensors_in([value.key_cache, value.value_cache, value.k_scale, value.v_scale])
    elif isinstance(value, GatherPlan):
        yield value.records
    elif isinstance(value, PrefixBatch):
        yield from (value.block_table, value.cu_seqlens_q, value.cu_seqlens_k, value.slots)


def raw(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))  # type: ignore[call-overload]


class Memory:
    """Copies of all storages that values stand on."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._copies: dict[int, tuple[str, Tensor, Tensor]] = {}
        for name, value in values.items():
            for tensor in tensors_in(value):
                storage = tensor.untyped_storage()
                if 0 < storage.nbytes() <= MOST_BYTES and storage.data_ptr() not in self._copies:
                    now = raw(storage)
                    self._copies[storage.data_ptr()] = (name, now, now.clone())

    def before(self, tensor: Tensor) -> Tensor:
        """A tensor's elements as they were."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._copies:
            return tensor.detach()
        copy = self._copies[storage.data_ptr()][2]
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(copy.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
        return -view if tensor.is_neg() else view

    def check(self, written: Iterable[Tensor] = ()) -> None:
        """Raise if a byte changed that belongs to none of the elements of `written`."""
        for tensor in written:
            address = tensor.untyped_storage().data_ptr()
            if tensor.numel() and address in self._copies:
                _, now, copy = self._copies[address]
                at = bytes_of(tensor)
                copy[at] = now[at]
        for name, now, copy in self._copies.values():
            if now.numel() and not torch.equal(now, copy):
                at = int((now != copy).nonzero()[0])
                raise Wrong(f"byte {at} of the memory of {name} changed")


def bytes_of(tensor: Tensor) -> Tensor:
    """Where the bytes of a tensor's elements are in its storage."""
    at = torch.tensor([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = (at[:, None] + torch.arange(size) * stride).flatten()
    width = tensor.element_size()
    return (at[:, None] * width + torch.arange(width)).flatten().unique()
