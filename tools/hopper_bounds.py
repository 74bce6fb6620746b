"""Where the Hopper kernel is faster than the direct kernel: both, in turns, near the bounds of `kvgather.hopper.plan`.

    python3 tools/hopper_bounds.py --out benchmarks/results/hopper_bounds_h100.csv

Each is compared with the float64 reference, then timed as a CUDA graph over inputs that do not fit in the L2 cache,
without the write of the new tokens. NHD, pages of 16, per-tensor e4m3fn, 8 KV heads.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KV_HEADS = 8
QUERY_HEADS = {64: 64, 128: 32}
SHAPES = {
    64: (
        "16 × 8192+2, 16 × 8192+3, 16 × 8192+4, 16 × 8192+8, 16 × 8192+9, 64 × 1024+4, 64 × 1024+8, 64 × 1024+16, "
        "12 × 8192+4, 13 × 8192+8, 64 × 8192+4, 16 × 1024+128, 16 × 0+512, 4 × 0+2048, 64 × 1536+16, 64 × 1536+8, "
        "64 × 2048+8, 64 × 2048+16, 10 × 8192+8, 8 × 8192+8"
    ),
    128: (
        "16 × 8192+1, 16 × 8192+4, 16 × 8192+5, 16 × 8192+8, 16 × 8192+9, 16 × 8192+16, 14 × 8192+16, 12 × 8192+16, "
        "64 × 2048+8, 64 × 2048+16, 64 × 1024+16, 10 × 8192+32, 16 × 1024+128, 16 × 0+512, 4 × 0+2048, 64 × 1024+32, "
        "64 × 1536+16, 10 × 8192+16, 9 × 8192+16"
    ),
}
"""Sequences × cached + new tokens, by head dim."""
TOLERANCE = 5e-3


class Shape(NamedTuple):
    """One layer over sequences of equal length."""

    dim: int
    sequences: int
    cached: int
    new: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return QUERY_HEADS[self.dim] // KV_HEADS


COLUMNS = (*Shape._fields, "direct_us", "hopper_us", "error", "device", "driver", "torch", "triton", "commit", "date")


def shapes() -> list[Shape]:
    found = []
    for dim, names in SHAPES.items():
        for name in names.split(", "):
            sequences, tokens = name.split(" × ")
            found.append(Shape(dim, int(sequences), *map(int, tokens.split("+"))))
    return found


def measure(shape: Shape, seconds: float) -> tuple[float, float, float]:
    """The medians of the direct and of the Hopper kernel in µs, and the larger error."""
    import torch

    from kvgather.bench import peer_kernels
    from kvgather.bench.peers import expected_of
    from kvgather.bench.runner import copies_for
    from kvgather.bench.turns import time_in_turns
    from kvgather.cases.prefix import PrefixCase, build_prefix

    device, n = torch.device("cuda"), shape.sequences
    case = PrefixCase(
        "bounds", new=(shape.new,) * n, cached=(shape.cached,) * n, q_heads=QUERY_HEADS[shape.dim], kv_heads=KV_HEADS,
        head_dim=shape.dim,
    )  # fmt: skip
    builts = [build_prefix(case, device, seed) for seed in range(copies_for(case.read_bytes, device))]
    for built in builts:
        built.cache.write(built.k_new, built.v_new, built.batch.slots)
    calls = {name: [peer.prepare(built) for built in builts] for name, peer in peer_kernels.find(device).items()}
    expected = expected_of(builts[0])
    error = max(expected.error(each[0]()) for each in calls.values())
    if not error <= TOLERANCE:
        raise ArithmeticError(f"{shape}: error {error:.2g}, accepted {TOLERANCE}")
    times = time_in_turns(calls, device, seconds=seconds)
    return times[peer_kernels.DIRECT].p50, times[peer_kernels.HOPPER].p50, error


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.12, help="to measure each kernel on each shape")
    parser.add_argument("--out", type=Path, help="a CSV file for the rows")
    arguments = parser.parse_args()
    import torch

    from kvgather.bench.machine import machine
    from kvgather.hopper.plan import available

    if not torch.cuda.is_available() or not available(torch.device("cuda", 0)):
        sys.exit("hopper_bounds needs a GPU of compute capability 9.0, and Triton 3.6")
    about, rows = machine("cuda"), []
    for shape in shapes():
        direct, hopper, error = measure(shape, arguments.seconds)
        print(f"{shape}: direct {direct:.1f} µs, Hopper {hopper:.1f} µs, {direct / hopper:.2f} ×", flush=True)
        own = [f"{direct:.1f}", f"{hopper:.1f}", f"{error:.1e}"]
        rows.append([*shape, *own, *about.values()])
        if arguments.out is not None:  # after each shape: a failure loses no rows
            with arguments.out.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
