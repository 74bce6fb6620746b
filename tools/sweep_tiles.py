"""Which tile is fastest for the direct kernel: every candidate on every case, on the GPU of this machine.

    python3 tools/sweep_tiles.py --out benchmarks/results/tiles_h100.csv
    python3 tools/sweep_tiles.py --case 32q8x128-NHD --seconds 0.1

Candidates are compiled first, by several processes at a time, into Triton's cache. Each is compared with the tile of
`choose_tile`, then timed as a CUDA graph over inputs that do not fit in the L2 cache, without the write of the new
tokens. One row a candidate, the fastest of a case first; `chosen` marks the tile of `choose_tile`. A candidate that
does not compile, or needs more shared memory than the GPU has, has no row.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from kvgather import PagedKVCache, PrefixBatch
    from kvgather.attention.direct import Tile

TOLERANCE = 1e-2
Inputs = tuple["Tensor", "PagedKVCache", "PrefixBatch"]
"""q, the cache and the batch, on the GPU."""


@dataclass(frozen=True)
class Shape:
    """One layer over one batch of equally long sequences, pages of 16, per-tensor e4m3fn."""

    q_heads: int
    kv_heads: int
    dim: int
    layout: str
    sequences: int
    cached: int
    new: int

    @property
    def name(self) -> str:
        heads = f"{self.q_heads}q{self.kv_heads}x{self.dim}-{self.layout}"
        return f"{heads}-{self.sequences}seqs-{self.cached}+{self.new}"

    @property
    def rows(self) -> int:
        """Rows of a KV head: new tokens × query heads of its group."""
        return self.new * self.q_heads // self.kv_heads


def shapes() -> Iterator[Shape]:
    for heads in ((64, 8, 64), (32, 8, 128)):
        for layout, new in itertools.product(("NHD", "SHUFFLE"), (1, 4, 16, 128, 512)):
            yield Shape(*heads, layout, 16, 8192, new)
        yield Shape(*heads, "NHD", 64, 1024, 1)
        yield Shape(*heads, "NHD", 1, 131072, 1)


def candidates(rows: int) -> Iterator[tuple[int, int, int, int, int | None]]:
    """Rows, keys, warps, stages and registers of the tiles worth trying."""
    for n, stages in itertools.product((64, 128), (2, 3, 4) if rows <= 16 else (2, 3)):
        if rows <= 16:
            yield from ((16, n, 2, stages, 128), (16, n, 2, stages, None), (16, n, 4, stages, None))
            continue
        if rows <= 32:
            yield from ((32, n, 2, stages, None), (32, n, 4, stages, None))
        if rows <= 64:
            yield from ((64, n, 4, stages, None), (64, n, 8, stages, None))
        else:
            yield from ((64, n, 4, stages, None), (128, n, 4, stages, None), (128, n, 8, stages, None))


def tiles(shape: Shape, processors: int) -> list[Tile]:
    """The chosen tile first; then each candidate with its keys split for 1, 2, 4 or 8 programs a processor."""
    from triton import next_power_of_2

    from kvgather.attention.direct import Tile, choose_tile

    pad, keys = next_power_of_2(shape.dim), shape.cached + shape.new
    found = [choose_tile(shape.rows, keys, shape.sequences * shape.kv_heads, pad, pad, processors, layout=shape.layout)]
    for m, n, warps, stages, registers in candidates(shape.rows):
        programs = shape.sequences * shape.kv_heads * -(-shape.rows // m)
        for resident in (2, 4, 8) if shape.rows <= 16 else (1, 2):
            splits = min(max(1, resident * processors // programs), 128, max(1, shape.cached // (4 * n)))
            found.append(Tile(m, n, warps, stages, splits, registers))
    return list(dict.fromkeys(found))


def kernel_of(shape: Shape, tile: Tile) -> tuple[object, ...]:
    """What tells compiled kernels apart; two tiles with one kernel differ in run-time numbers alone."""
    splits, parts = tile.splits, -(-shape.rows // tile.m)
    classes = (splits == 1, splits % 16 == 0, parts == 1, parts % 16 == 0)
    return shape.q_heads, shape.dim, shape.layout, tile._replace(splits=1), classes


def build(shape: Shape, seed: int) -> Inputs:
    import torch

    import kvgather as kg

    random = torch.Generator("cuda").manual_seed(seed)
    tokens = shape.cached + shape.new
    pages, page_size = -(-tokens // 16), 16
    blocks = pages * shape.sequences
    scale = torch.tensor([0.05], device="cuda")
    cache = kg.PagedKVCache(
        num_blocks=blocks, page_size=page_size, num_kv_heads=shape.kv_heads, head_dim=shape.dim, layout=shape.layout,
        dtype=torch.float8_e4m3fn, scale="per-tensor", k_scale=scale, v_scale=scale, device="cuda",
    )  # fmt: skip
    for pool in (cache.key_cache, cache.value_cache):
        codes = torch.randn(pool.shape, generator=random, device="cuda").mul_(16).clamp_(-200, 200)
        pool.copy_(codes.to(torch.float8_e4m3fn))
    table = torch.randperm(blocks, generator=random, device="cuda").int().view(shape.sequences, pages)
    offsets = torch.arange(shape.sequences + 1, device="cuda", dtype=torch.int32)
    batch = kg.PrefixBatch.build(
        table, offsets * shape.new, offsets * tokens, page_size=page_size, num_blocks=blocks,
        seqlens_q=[shape.new] * shape.sequences, seqlens_k=[tokens] * shape.sequences,
    )  # fmt: skip
    rows = shape.new * shape.sequences, shape.q_heads, shape.dim
    return torch.randn(rows, generator=random, device="cuda").bfloat16(), cache, batch


def attend(inputs: Inputs, shape: Shape, tile: Tile | None) -> Tensor:
    from kvgather.attention.direct import direct_attention

    q, cache, batch = inputs
    return direct_attention(q, cache, batch, softmax_scale=shape.dim**-0.5, tile=tile)[0]


def compile_some(work: list[tuple[Shape, Tile]]) -> list[tuple[Shape, Tile, str]]:
    """Run each tile once, on a small batch that needs the same kernel; what failed, and why."""
    import torch

    failed: list[tuple[Shape, Tile, str]] = []
    for shape, tile in work:
        try:
            attend(build(replace(shape, sequences=1, cached=128), 0), shape, tile)
        except Exception as error:  # the compiler refuses the tile, or the GPU has too little shared memory
            failed.append((shape, tile, f"{type(error).__name__}: {str(error)[:100]}"))
    torch.cuda.synchronize()
    return failed


def measure(shape: Shape, found: list[Tile], seconds: float) -> list[tuple[Tile, float]]:
    """Each tile's median in µs, the fastest first."""
    import torch

    from kvgather.bench.runner import cache_bytes, time_calls

    device = torch.device("cuda")
    size = 2 * shape.sequences * shape.cached * shape.kv_heads * shape.dim
    copies = [build(shape, seed) for seed in range(min(4, max(1, -(-2 * cache_bytes(device) // size))))]
    expected, times = attend(copies[0], shape, None).float(), []
    for tile in found:
        error = float((attend(copies[0], shape, tile).float() - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            print(f"  WRONG: {shape.name} {tile}: error {error:.2g}", file=sys.stderr)
            continue
        calls: list[Callable[[], object]] = [partial(attend, inputs, shape, tile) for inputs in copies]
        times.append((tile, time_calls(calls, device, seconds=seconds).p50))
    return sorted(times, key=lambda pair: pair[1])


def compile_all(work: dict[Shape, list[Tile]]) -> set[tuple[object, ...]]:
    """Compile every kernel in parallel; those that failed."""
    kernels = {kernel_of(shape, tile): (shape, tile) for shape, found in work.items() for tile in found}
    print(f"{sum(map(len, work.values()))} tiles of {len(work)} cases, {len(kernels)} kernels", flush=True)
    jobs, processes = list(kernels.values()), os.cpu_count() or 1
    failed = set()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        chunks = [jobs[i :: 4 * processes] for i in range(4 * processes)]
        for shape, tile, why in itertools.chain.from_iterable(pool.imap_unordered(compile_some, chunks)):
            print(f"  {shape.name} {tile}: {why}", flush=True)
            failed.add(kernel_of(shape, tile))
    return failed


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="part of a case's name; all by default")
    parser.add_argument("--seconds", type=float, default=0.05, help="to measure each tile")
    parser.add_argument("--out", type=Path, help="a CSV file for the rows, written after each case")
    arguments = parser.parse_args()
    import torch

    from kvgather.bench.machine import machine

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    work = {shape: tiles(shape, processors) for shape in shapes() if arguments.case in shape.name}
    failed = compile_all(work)
    rows: list[dict[str, Any]] = []
    for shape, found in work.items():
        times = measure(shape, [tile for tile in found if kernel_of(shape, tile) not in failed], arguments.seconds)
        for tile, median in times:
            rows.append({
                "case": shape.name, **vars(tile), "p50_us": round(median, 2), "chosen": tile == found[0],
                **machine("cuda"),
            })  # fmt: skip
        chosen = next((median for tile, median in times if tile == found[0]), float("nan"))
        print(f"{shape.name}: {chosen:.1f} µs chosen, {times[0][1]:.1f} µs {times[0][0]}", flush=True)
        if arguments.out is not None:
            with arguments.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
