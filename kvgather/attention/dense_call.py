"""One call of the dense attention: what the backends share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """The arguments of `dense_attention`, checked.

    Attributes:
        q, k, v: rows.
        cu_q, cu_k: offsets of the sequences.
        max_q, max_k: upper bounds of their lengths.
        scale: what scores are multiplied by.
        causal, window: the mask.
        lens_q, lens_k: the lengths, where the host knows them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    scale: float
    causal: bool
    window: int | None
    lens_q: tuple[int, ...] | None
    lens_k: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, and query heads to a KV head."""
        q_heads, kv_heads = self.q.shape[1], self.k.shape[1]
        return q_heads, kv_heads, q_heads // kv_heads

    @property
    def all_rows_used(self) -> bool:
        """Whether every row of q is known to belong to a sequence."""
        return self.lens_q is not None and sum(self.lens_q) == self.rows

    @property
    def all_rows_see(self) -> bool:
        """Whether every row of q is known to see a key."""
        if self.lens_q is None or self.lens_k is None or not self.all_rows_used:
            return False
        least = ((q if self.causal else 1) if q else 0 for q in self.lens_q)
        return all(k >= needed for k, needed in zip(self.lens_k, least, strict=True))

    @property
    def nothing_to_see(self) -> bool:
        """Whether it is known that no row sees a key."""
        return 0 in (*self.q.shape, *self.k.shape, *self.v.shape, self.max_q, self.max_k, len(self.cu_q) - 1)

    def empty(self) -> tuple[Tensor, Tensor]:
        """What rows are that see nothing: 0 and −inf."""
        out = self.q.new_zeros((*self.q.shape[:2], self.v.shape[2]))
        return out, torch.full(out.shape[:2], -math.inf, dtype=torch.float32, device=out.device)


def for_kernels(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if a kernel could not load 16 bytes of its last axis at a time."""
    per_load = 16 // tensor.element_size()
    apart = all(stride % per_load == 0 for stride in tensor.stride()[:-1])
    return (
        tensor
        if tensor.stride(-1) == 1 and apart and tensor.data_ptr() % 16 == 0
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def why_no_gpu_kernel(call: Dense) -> str | None:
    """Why PyTorch's kernels for 16 bits cannot be asked; None if they can."""
    if call.q.device.type != "cuda":
        return f"it is a GPU's, and q is on {call.q.device}"
    if torch.version.hip is not None:
        return "its private entry points were never tried on an AMD GPU"
    if call.q.dtype == torch.float32:
        return "it multiplies 16-bit numbers, and q is float32"
    if torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return "it needs an Ampere GPU, or a later one"
    return None
