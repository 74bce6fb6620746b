"""Which tile is fastest for the direct kernel: every candidate on every case, on the GPU of this machine.

    python3 tools/sweep_tiles.py --out benchmarks/results/tiles_h100.csv
    python3 tools/sweep_tiles.py --case 32q8x128-NHD --seconds 0.1

Candidates are compiled first, by several processes at a time, and kept in Triton's cache. Each is checked against the
tile that `choose_tile` gives, then timed as a CUDA graph over inputs that do not fit in the L2 cache, without the write
of the new tokens. One row a candidate, the fastest first; `chosen` marks the tile of `choose_tile`. A candidate that
does not compile, or needs more shared memory than the GPU has, has no row.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("case", "m", "n", "num_warps", "num_stages", "splits", "registers", "p50_us", "chosen", "device", "torch",
          "triton", "commit", "date")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One layer over one batch."""

    q_heads: int
    kv_heads: int
    dim: int
    layout: str
    sequences: int
    cached: int
    new: int
    kind: str = "per-tensor"

    @property
    def name(self) -> str:
        heads = f"{self.q_heads}q{self.kv_heads}x{self.dim}-{self.layout}"
        kind = "" if self.kind == "per-tensor" else f"-{self.kind}"
        return f"{heads}{kind}-{self.sequences}seqs-{self.cached}+{self.new}"


def shapes() -> list[Shape]:
    heads = ((64, 8, 64), (32, 8, 128))
    found = [
        Shape(*head, layout, 16, 8192, new)
        for head, layout, new in itertools.product(heads, ("NHD", "SHUFFLE"), (1, 16, 128, 512, 4))
    ]
    for head in heads:
        found += [Shape(*head, "NHD", 64, 1024, 1), Shape(*head, "NHD", 1, 131072, 1)]
    return found


def candidates(shape: Shape) -> Iterator[tuple[int, int, int, int, int | None]]:
    """(m, n, num_warps, num_stages, registers)."""
    rows = shape.new * shape.q_heads // shape.kv_heads
    if rows <= 16:
        for n, stages in itertools.product((64, 128), (2, 3, 4)):
            yield 16, n, 2, stages, 128
            yield 16, n, 2, stages, None
            yield 16, n, 4, stages, None
    elif rows <= 64:
        for n, stages in itertools.product((64, 128), (2, 3)):
            if rows <= 32:
                yield 32, n, 2, stages, None
                yield 32, n, 4, stages, None
            yield 64, n, 4, stages, None
            yield 64, n, 8, stages, None
    else:
        for n, stages in itertools.product((64, 128), (2, 3)):
            yield 64, n, 4, stages, None
            yield 128, n, 4, stages, None
            yield 128, n, 8, stages, None


def tiles(shape: Shape, chosen: Any, processors: int) -> list[Any]:
    from kvgather.attention.direct import Tile

    found = [chosen]
    rows = shape.new * shape.q_heads // shape.kv_heads
    for m, n, warps, stages, registers in candidates(shape):
        programs = shape.sequences * shape.kv_heads * -(-rows // m)
        splits = set()
        for resident in (2, 4, 8) if rows <= 16 else (1, 2):
            splits.add(min(max(1, resident * processors // programs), 64, max(1, shape.cached // (4 * n))))
        found += [Tile(m, n, warps, stages, split, registers) for split in sorted(splits)]
    return list(dict.fromkeys(found))


def build(shape: Shape, seed: int) -> tuple[Any, Any, Any]:
    """q, the cache and the batch, on the GPU."""
    import torch

    import kvgather as kg

    random = torch.Generator("cuda").manual_seed(seed)
    tokens = shape.cached + shape.new
    pages = -(-tokens // 16)
    blocks = pages * shape.sequences
    scale = torch.tensor([0.05], device="cuda")
    one = None if shape.kind == "per-tensor" else torch.full((blocks, shape.kv_heads, 16), 0.05, device="cuda")
    cache = kg.PagedKVCache(
        num_blocks=blocks, page_size=16, num_kv_heads=shape.kv_heads, head_dim=shape.dim, layout=shape.layout,
        dtype=torch.float8_e4m3fn, scale=shape.kind, device="cuda",
        **({"k_scale": scale, "v_scale": scale} if one is None else {}),
    )  # fmt: skip
    for pool in (cache.key_cache, cache.value_cache):
        codes = torch.randn(pool.shape, generator=random, device="cuda").mul_(16).clamp_(-200, 200)
        pool.copy_(codes.to(torch.float8_e4m3fn))
    if one is not None:
        cache.k_scale.copy_(one)
        cache.v_scale.copy_(one)
    table = torch.randperm(blocks, generator=random, device="cuda").int().view(shape.sequences, pages)
    cu_q = torch.arange(shape.sequences + 1, device="cuda", dtype=torch.int32)
    batch = kg.PrefixBatch.build(
        table, cu_q * shape.new, cu_q * tokens, page_size=16, num_blocks=blocks, total_q=shape.new * shape.sequences,
        total_k=tokens * shape.sequences, max_q=shape.new, max_k=tokens,
        seqlens_q=[shape.new] * shape.sequences, seqlens_k=[tokens] * shape.sequences,
    )  # fmt: skip
    q = torch.randn(shape.new * shape.sequences, shape.q_heads, shape.dim, generator=random, device="cuda").bfloat16()
    return q, cache, batch


def compile_some(work: list[tuple[Shape, Any]]) -> list[tuple[Shape, Any, str]]:
    """Run each tile once on a small batch that needs the same kernel; the errors."""
    from dataclasses import replace

    import torch

    from kvgather.attention.direct import direct_attention

    failed, built = [], {}
    for shape, tile in work:
        small = replace(shape, sequences=1, cached=128)
        if small not in built:
            built = {small: build(small, 0)}
        q, cache, batch = built[small]
        try:
            direct_attention(q, cache, batch, softmax_scale=shape.dim**-0.5, tile=tile)
        except Exception as error:  # a tile that the compiler, or the GPU's shared memory, refuses
            failed.append((shape, tile, f"{type(error).__name__}: {str(error)[:100]}"))
    torch.cuda.synchronize()
    return failed


def measure(shape: Shape, found: list[Any], seconds: float) -> list[tuple[Any, float]]:
    import torch

    from kvgather.attention.direct import direct_attention
    from kvgather.bench.runner import cache_bytes, time_calls

    device = torch.device("cuda")
    size = 2 * shape.sequences * shape.cached * shape.kv_heads * shape.dim
    builts = [build(shape, seed) for seed in range(min(4, max(1, -(-2 * cache_bytes(device) // size))))]

    def call(built: tuple[Any, Any, Any], tile: Any) -> Any:
        q, cache, batch = built
        return direct_attention(q, cache, batch, softmax_scale=shape.dim**-0.5, tile=tile)[0]

    expected, times = call(builts[0], None).float(), []
    for tile in found:
        error = (call(builts[0], tile).float() - expected).norm() / expected.norm()
        if not float(error) <= 1e-2:
            print(f"  WRONG: {shape.name} {tile}: error {float(error):.2g}", file=sys.stderr)
            continue
        timing = time_calls([lambda b=b, t=tile: call(b, t) for b in builts], device, seconds=seconds)
        times.append((tile, timing.p50))
    return sorted(times, key=lambda pair: pair[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="part of a case's name; all by default")
    parser.add_argument("--seconds", type=float, default=0.05, help="to measure each tile")
    parser.add_argument("--out", type=Path, default=None, help="a CSV file of all rows")
    parser.add_argument("--within", type=float, default=1e9, help="stop after so many seconds")
    arguments = parser.parse_args()
    import time

    end = time.monotonic() + arguments.within
    import torch

    from kvgather.attention.direct import tile_of
    from kvgather.bench.runner import machine

    work: dict[Shape, list[Any]] = {}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = {}
    for shape in shapes():
        if arguments.case in shape.name:
            from triton import next_power_of_2

            from kvgather.attention.direct import choose_tile

            rows = shape.new * shape.q_heads // shape.kv_heads
            padded = next_power_of_2(shape.dim)
            chosen[shape] = choose_tile(
                rows, shape.cached + shape.new, shape.sequences * shape.kv_heads, padded, padded, processors
            )
            work[shape] = tiles(shape, chosen[shape], processors)
    assert tile_of
    kinds: dict[tuple[Any, ...], tuple[Shape, Any]] = {}  # splits do not matter, except whether there are any
    for shape, found in work.items():
        for tile in found:
            key = (shape.q_heads, shape.dim, shape.layout, shape.kind, tile.m, tile.n, tile.num_warps,
                   tile.num_stages, tile.registers, tile.splits > 1, tile.splits % 16 == 0,
                   -(-shape.new * shape.q_heads // shape.kv_heads // tile.m) == 1)  # fmt: skip
            kinds.setdefault(key, (shape, tile))
    jobs = list(kinds.values())
    print(f"{sum(map(len, work.values()))} tiles of {len(work)} cases, {len(jobs)} kernels", flush=True)
    context = multiprocessing.get_context("spawn")
    processes = os.cpu_count() or 1
    with context.Pool(processes) as pool:
        chunks = [jobs[i :: 4 * processes] for i in range(4 * processes)]
        failed = {(s, t): why for part in pool.imap_unordered(compile_some, chunks) for s, t, why in part}
    for (shape, tile), why in failed.items():
        print(f"  {shape.name} {tile}: {why}")
    print(f"compiled; {end - time.monotonic():.0f} s left", flush=True)
    bad = {(s.q_heads, s.dim, s.layout, s.kind, t.m, t.n, t.num_warps, t.num_stages, t.registers) for s, t in failed}
    rows_out: list[dict[str, Any]] = []
    for shape, found in work.items():
        if time.monotonic() > end:
            print("out of time", flush=True)
            break
        good = [t for t in found if (shape.q_heads, shape.dim, shape.layout, shape.kind, t.m, t.n, t.num_warps,
                                     t.num_stages, t.registers) not in bad]  # fmt: skip
        times = measure(shape, good, arguments.seconds)
        for tile, time_us in times:
            rows_out.append({
                "case": shape.name, "m": tile.m, "n": tile.n, "num_warps": tile.num_warps,
                "num_stages": tile.num_stages, "splits": tile.splits, "registers": tile.registers or "",
                "p50_us": round(time_us, 2), "chosen": tile == chosen[shape],
                **{k: v for k, v in machine("cuda").items() if k in FIELDS},
            })  # fmt: skip
        best, mine = times[0], next(t for t in times if t[0] == chosen[shape])
        print(f"{shape.name}: {mine[1]:.1f} -> {best[1]:.1f} us {best[0]} (now {mine[0]})", flush=True)
        if arguments.out is not None:
            with arguments.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows_out)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
