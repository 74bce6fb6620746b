"""The gathers that benchmarks time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..formats.layout import LAYOUTS
from .case import Case

RAGGED = tuple(8192 + 113 * (5 * i % 16) - 847 for i in range(16))
"""Lengths of 16 sequences around 8,192 tokens, one for each remainder modulo 16."""
LONGER = tuple(length + 870 for length in RAGGED)
"""145,000 tokens: the batch whose plan build is timed too."""
GPU_BASE = Case(num_heads=8, k_dim=64, v_dim=64, lengths=RAGGED, starts=())
CPU_BASE = replace(GPU_BASE, lengths=(4096,) * 8)
HOST = Case(num_heads=8, k_dim=64, v_dim=64, lengths=(512,) * 16, starts=())
"""The batch of the host times."""
CALLS = tuple(
    Case(layout=layout, num_heads=heads, k_dim=dim, v_dim=dim, lengths=(tokens // 16,) * 16, starts=())
    for heads, dim in ((8, 64), (8, 128), (1, 64))
    for layout in ("NHD", "SHUFFLE")
    for tokens in (1536, 16384, 131072)
)
"""The batches of the engines' call: the host's time dominates the smallest, the kernel's time the largest."""
STEPS = tuple(replace(GPU_BASE, layout=layout) for layout in ("SHUFFLE", "NHD"))
"""The batches of chapter 07's kernels: one scale for K and one for V."""


def cases(device: torch.device) -> tuple[Case, ...]:
    """The cases of `kvgather bench gather` on a device."""
    return tuple(_gpu_cases() if device.type == "cuda" else _cpu_cases())


def _gpu_cases() -> Iterator[Case]:
    for dim in (64, 128):
        for page in (16, 32, 64, 128):
            for layout in LAYOUTS:
                for kind in ("per-tensor", "per-head", "per-token-head"):
                    yield replace(
                        GPU_BASE, layout=layout, page_size=page, k_dim=dim, v_dim=dim, k_kind=kind, v_kind=kind
                    )
    for layout in LAYOUTS:
        yield replace(GPU_BASE, layout=layout, num_heads=1)
        yield replace(GPU_BASE, layout=layout, k_dim=192, v_dim=128)
        yield replace(GPU_BASE, layout=layout, lengths=(262144,))
        yield replace(GPU_BASE, layout=layout, lengths=(512,) * 256)
        yield replace(GPU_BASE, layout=layout, dtype=torch.bfloat16, k_kind="none", v_kind="none")
        yield replace(GPU_BASE, layout=layout, dtype=torch.float8_e5m2)
        yield replace(GPU_BASE, layout=layout, dtype=torch.float8_e4m3fnuz)  # decoded in software on NVIDIA GPUs
        yield replace(GPU_BASE, layout=layout, lengths=(1500,))
        yield replace(GPU_BASE, layout=layout, lengths=LONGER)
    yield from CALLS


def _cpu_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        for kind in ("per-tensor", "per-token-head"):
            yield replace(CPU_BASE, layout=layout, k_kind=kind, v_kind=kind)
