"""A small paged cache, and a call of the gather before the fix with its expected result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgather.device import has_gpu
from kvgather.formats.fp8 import quantize
from kvgather.formats.layout import convert

DEVICE = "cuda" if has_gpu() else "cpu"
BLOCKS, PAGE, HEADS, K_DIM, V_DIM = 6, 16, 2, 16, 24
TABLE = [[4, 1], [3, 0]]
LENGTHS = [2, 1]
STARTS = [15, 1]
PLACES = [(4, 15), (1, 0), (3, 1)]  # (block, page offset) of the three tokens, computed by hand


@dataclass
class Call:
    """Arguments of `cp_mha_gather_cache`, and the expected K and V."""

    arguments: dict[str, Any]
    want: tuple[Tensor, Tensor]

    @property
    def got(self) -> tuple[Tensor, Tensor]:
        return self.arguments["key"], self.arguments["value"]


def make_call(
    layout: str, dtype: torch.dtype, k_scale: Tensor, v_scale: Tensor | None = None, *, dequant: bool = True
) -> Call:
    from kvgather.lab.before_fix import token_to_batch

    v_scale = k_scale.clone() if v_scale is None else v_scale
    cpu_scales = (k_scale.cpu(), v_scale.cpu())
    generator = torch.Generator().manual_seed(0)
    pools = [
        quantize(torch.randn(BLOCKS, PAGE, HEADS, dim, generator=generator), None, dtype) for dim in (K_DIM, V_DIM)
    ]
    want = []
    for pool, scale in zip(pools, cpu_scales, strict=True):
        rows = torch.zeros(len(PLACES), HEADS, pool.shape[3])
        for row, (block, slot) in enumerate(PLACES):
            for head in range(HEADS):
                factor = scale.reshape(-1)[0] if scale.numel() == 1 else scale[block, head, slot]
                rows[row, head] = pool[block, slot, head].float() * (factor if dequant else 1.0)
        want.append(rows)
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    arguments = {
        "key_cache": convert(pools[0], "NHD", layout, "key"),
        "value_cache": convert(pools[1], "NHD", layout, "value"),
        "key": torch.zeros(3, HEADS, K_DIM),
        "value": torch.zeros(3, HEADS, V_DIM),
        "block_tables": torch.tensor(TABLE, dtype=torch.int32),
        "k_scales": k_scale,
        "v_scales": v_scale,
        "cu_seqlens_kv": cu_seqlens,
        "token_to_batch": token_to_batch(cu_seqlens),
        "seq_starts": torch.tensor(STARTS, dtype=torch.int32),
        "dequant": dequant,
        "kv_cache_layout": layout,
        "total_tokens": 3,
    }
    arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for name, value in arguments.items()
    }
    return Call(arguments, (want[0].to(DEVICE), want[1].to(DEVICE)))


@pytest.fixture
def call() -> Callable[..., Call]:
    return make_call
