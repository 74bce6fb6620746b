"""Compile the direct kernel for compute capability 9.0 in many ways, and check each as `test_direct_descriptors` does.

    python -m tests.attention.descriptor_scan [--draws 2] [--seed 0] [--unguarded] [--ptxas PATH ...]

Every tile of `choose_tile` with every pair of padded head dims, `draws` times each with dtypes, layouts, kinds of
scales, pages, windows, splits and states drawn at random. One line for each; the exit status says whether any is wrong.
Each takes about five seconds on a free core. `--ptxas` assembles the same PTX with other versions too.
"""

from __future__ import annotations

import argparse
import base64
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvgather.formats.fp8 import POOL_DTYPES
from kvgather.formats.layout import LAYOUTS
from kvgather.formats.scale import KINDS
from tests.attention._direct_assembly_child import Job
from tests.attention.descriptors import disassembled, faults, tool, version_of
from tests.attention.test_direct_aot import compile_in_a_child

PADS = (16, 32, 64, 128, 256)


def tiles(k_pad: int, v_pad: int) -> list[tuple[int, int, int, int]]:
    """Rows, keys, warps and stages that `choose_tile` can choose for two padded head dims."""
    wide = max(k_pad, v_pad)
    if wide > 128:
        return [(m, 64, 8, 2) for m in (16, 32, 64)]
    if wide > 64:
        return [(16, 64, 2, 2), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 4, 2)]
    return [(16, 64, 2, 2), (64, 128, 4, 2), (128, 128, 4, 2)]


def draw(drawn: random.Random, tile: tuple[int, int, int, int], pads: tuple[int, int], guarded: bool) -> Job:
    while True:
        dtype, layout, page = drawn.choice(POOL_DTYPES), drawn.choice(LAYOUTS), drawn.choice((1, 16, 64))
        less = drawn.choice((0, 0, 4, 8))
        dims, x = (pads[0] - less, pads[1] - less), 16 // dtype.itemsize
        if dtype.itemsize < 4 and (layout != "SHUFFLE" or not (page % x or dims[0] % x or dims[1] % x)):
            break
    return Job(
        "cuda:90", layout, (drawn.choice(KINDS), drawn.choice(KINDS)), dtype,
        drawn.choice((torch.bfloat16, torch.float16)), drawn.choice(((8, 1), (8, 8), (3, 1))), dims, page,
        (*tile, drawn.choice((1, 4))), drawn.choice((None, None, 5, 128)), drawn.random() < 0.25, drawn.random() < 0.5,
        drawn.choice((1, 9, 200)), 4, guarded=guarded,
    )  # fmt: skip


def jobs(draws: int, seed: int, guarded: bool) -> Iterator[Job]:
    drawn = random.Random(seed)
    for _ in range(draws):
        for k_pad in PADS:
            for v_pad in PADS:
                for tile in tiles(k_pad, v_pad):
                    yield draw(drawn, tile, (k_pad, v_pad), guarded)


def answers(todo: list[Job], folder: Path, at_once: int = 10) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job and what was compiled for it; a process compiles a few."""
    for first in range(0, len(todo), at_once):
        yield from compile_in_a_child(todo[first : first + at_once], folder).items()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unguarded", action="store_true", help="leave out the launcher's guard")
    parser.add_argument("--ptxas", type=Path, nargs="*", default=[], help="other assemblers")
    asked = parser.parse_args()
    assemblers, nvdisasm = [tool("ptxas"), *asked.ptxas], tool("nvdisasm")
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        ptx, cubin = Path(name, "kernel.ptx"), Path(name, "kernel.cubin")
        for job, answer in answers(list(jobs(asked.draws, asked.seed, not asked.unguarded)), Path(name, "triton")):
            if "error" in answer:
                print(f"{job} tile {job.tile}: {answer['error']}", flush=True)
                wrong += 1
                continue
            ptx.write_text(answer["text"])
            cubin.write_bytes(base64.b64decode(answer["cubin"]))
            for i, ptxas in enumerate(assemblers):
                if i:
                    subprocess.run([ptxas, "--gpu-name=sm_90a", ptx, "-o", cubin], check=True)
                found = faults(answer["text"], disassembled(cubin, nvdisasm))
                wrong += bool(found)
                version = ".".join(map(str, version_of(ptxas)))
                print(f"{job} tile {job.tile}: ptxas {version}: {found[:3] or 'right'}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
