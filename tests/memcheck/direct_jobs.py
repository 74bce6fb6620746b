"""Direct attention, one launch for every tile that its launcher chooses, by layout, pool dtype and padded head dims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from kvgather.attention.reference import reference_attention
from kvgather.cases import fits as layout_fits
from kvgather.formats.checks import dtype_name
from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS

PADS = (16, 32, 64, 128, 256)
"""What head dims are rounded up to; `MASKED` has a dim for each that it is rounded up from."""
MASKED = {16: 8, 32: 24, 64: 48, 128: 80, 256: 192}
ROWS, KEYS, PROGRAMS = (1, 16, 17, 32, 33, 64, 65, 4096), (64, 1024, 8192), (1, 16, 128, 4096)
"""Of a batch: rows of a sequence, keys of a sequence, sequences × KV heads; on both sides of each bound of a tile."""


@dataclass(frozen=True)
class Direct:
    """One launch.

    Attributes:
        tile: rows, keys, warps, stages, splits, registers (None is as many as it takes).
        dims: of K, of V.
        kinds: of K's scale, of V's.
        state: whether it goes on from a state, at a position inside the cached keys.
    """

    tile: tuple[int, int, int, int, int, int | None]
    dims: tuple[int, int]
    layout: str = "NHD"
    dtype: torch.dtype = torch.float8_e4m3fn
    kinds: tuple[str, str] = ("per-tensor", "per-tensor")
    q_dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    window: int | None = None
    sinks: bool = False
    state: bool = False

    def __str__(self) -> str:
        tile = "x".join(str(part) for part in self.tile[:5])
        parts = [f"{self.dims[0]}:{self.dims[1]}", self.layout, dtype_name(self.dtype), ":".join(self.kinds)]
        parts += [f"q {dtype_name(self.q_dtype)}"] if self.q_dtype != torch.bfloat16 else []
        parts += [f"tile {tile}", f"page{self.page_size}"]
        parts += [f"window{self.window}"] if self.window else []
        parts += ["sinks"] if self.sinks else []
        parts += ["state"] if self.state else []
        return " ".join(parts)

    def run(self, device: str) -> None:
        """Attend, and compare with the formula on a CPU over what the pool holds."""
        from kvgather.attention.direct import Tile, direct_attention
        from tests.attention.batches import assert_close
        from tests.attention.direct_cases import filled

        new = [-(-self.tile[0] // 8) + 1, 1]
        made = filled(
            new, [2 * self.tile[1] + 21, 37], self.kinds, heads=(8, 1), dims=self.dims, page_size=self.page_size,
            layout=self.layout, dtype=self.dtype, q_dtype=self.q_dtype, device=device, spare=2,
        )  # fmt: skip
        sinks = torch.linspace(-1, 1, 8) if self.sinks else None
        more: dict[str, Any] = {}
        begins = [19, 0]
        if self.state:
            more = {"begin": torch.tensor(begins, dtype=torch.int32, device=device), "state": self._state(made, begins)}
        got = direct_attention(
            made.q, made.cache, made.batch(), softmax_scale=self.dims[0] ** -0.5, tile=Tile(*self.tile),
            window=self.window, sinks=None if sinks is None else sinks.to(device), **more,
        )  # fmt: skip
        k, v = (rows.cpu() for rows in made.held())
        offsets = [offset.cpu() for offset in made.offsets]
        wanted = reference_attention(made.q.cpu(), k, v, *offsets, window=self.window, sinks=sinks)
        assert_close((got[0].cpu(), got[1].cpu()), wanted, made.rows)

    def _state(self, made: Any, begins: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        from tests.attention.test_direct import state_before

        out, lse = state_before(made, begins)
        return out.to(self.q_dtype), lse


def tiles(
    k_pad: int, v_pad: int, operand_bytes: int = 2, layout: str = "NHD"
) -> list[tuple[int, int, int, int, int, int | None]]:
    """Every tile that the launcher chooses for these dims, its splits left out: 1."""
    from kvgather.attention.direct import choose_tile

    batches = product(ROWS, KEYS, PROGRAMS)
    chosen = (choose_tile(*batch, k_pad, v_pad, 132, operand_bytes, layout) for batch in batches)
    return sorted({(t.m, t.n, t.num_warps, t.num_stages, 1, t.registers) for t in chosen}, key=str)


def operand_bytes(dtype: torch.dtype, q_dtype: torch.dtype) -> int:
    """Of an element as it is multiplied."""
    return 4 if torch.float32 in (dtype, q_dtype) else 2


def fits(job: Direct) -> bool:
    return layout_fits(job.layout, job.page_size, job.dims[0], job.dtype)


def _squares() -> Iterator[Direct]:
    """K and V of one padded dim: every tile, layout and dtype."""
    for pad, layout, dtype in product(PADS, LAYOUTS, POOL_DTYPES):
        for tile in tiles(pad, pad, operand_bytes(dtype, torch.bfloat16), layout):
            yield Direct(tile, (pad, pad), layout, dtype)


def _others() -> Iterator[Direct]:
    """K and V of different padded dims, and dims that are rounded up: every tile, layouts and dtypes in turn."""
    nth = 0
    for k_pad, v_pad in product(PADS, PADS):
        dims = (MASKED[k_pad], MASKED[v_pad]) if k_pad == v_pad else (k_pad, v_pad)
        for tile in tiles(k_pad, v_pad):
            turns = (Direct(tile, dims, LAYOUTS[i % 3], POOL_DTYPES[i // 3 % 5]) for i in range(nth, nth + 15))
            yield next(job for job in turns if fits(job))
            nth += 4


def _single() -> Iterator[Direct]:
    """FP32 rows of q over every pool dtype in turn."""
    nth = 0
    for pad in PADS:
        for tile in tiles(pad, pad, 4):
            turns = (
                Direct(tile, (pad, pad), LAYOUTS[i % 3], POOL_DTYPES[i % 6], q_dtype=torch.float32)
                for i in (nth, nth + 1)
            )
            yield next(job for job in turns if fits(job))
            nth += 5


def _varied(jobs: Iterator[Direct]) -> Iterator[Direct]:
    """Each with its turn of scale kinds, pages, windows, sinks, splits, states and dtypes of q."""
    for i, job in enumerate(jobs):
        kinds = (KINDS[i % 5], KINDS[(i + i // 5) % 5])
        page_size, state = (16, 64, 16, 1, 3)[i % 5], i % 7 == 0
        window = None if state else (None, None, 40, None, 5)[i // 2 % 5]  # a state has keys before the window
        q_dtype = job.q_dtype if job.q_dtype == torch.float32 else (torch.bfloat16, torch.float16)[i // 3 % 2]
        varied = replace(
            job, kinds=kinds, tile=(*job.tile[:4], 1 + i % 2, job.tile[5]), window=window, sinks=i % 3 == 0,
            state=state, q_dtype=q_dtype,
        )  # fmt: skip
        if fits(job):
            yield replace(varied, page_size=page_size) if fits(replace(varied, page_size=page_size)) else varied


DIRECT: tuple[Direct, ...] = tuple(dict.fromkeys(_varied(iter((*_squares(), *_others(), *_single())))))
SPLITS: tuple[Direct, ...] = tuple(
    Direct((16, 64, 2, 2, splits, 128), (64, pad), sinks=sinks, q_dtype=dtype)
    for (splits, pad), (sinks, dtype) in zip(
        product((2, 3, 8, 16, 33, 64), PADS),
        [(True, torch.bfloat16), (False, torch.float16), (True, torch.float16), (False, torch.bfloat16)] * 8,
        strict=False,
    )
)
"""Parts of every number and padded dim that `combine_kernel` merges."""
