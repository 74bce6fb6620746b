"""`kvgather bench`: measurements."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

from ..bench.results import RESULTS
from .arguments import Commands, seconds
from .status import OK

PARALLEL = "parallel"
BENCHMARKS = {
    "gather": "the gather, planned and as engines call it, against upstream's form and the memory's limit",
    "steps": "the kernels of chapter 07, each one change from the one before",
    "host": "how long one eager call keeps the host busy, in raw launches of upstream's form",
    "prefix": "the prefix path both ways, the choice between them, one program per (token, head), and the limits",
    PARALLEL: "one long context on several GPUs, against one GPU; torchrun starts it",
}
"""The benchmarks of `kvgather bench`: each is the function `run` of the module `kvgather.bench.NAME`."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure the gather, the prefix path and host times, against upstream's form and the memory's limit",
        description="Checks each implementation against the reference, then measures its time; on a GPU with CUDA "
        "graphs, over inputs larger than the L2 cache.",
    )
    descriptions = "; ".join(f"{name}: {description}" for name, description in BENCHMARKS.items())
    parser.add_argument("what", choices=tuple(BENCHMARKS), metavar="WHAT", help=descriptions)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if the machine has one")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--seconds", type=seconds, default=0.2, help="approximate time per measurement; default: 0.2")
    parser.add_argument(
        "--csv", metavar="FILE", nargs="?", const="", help="also write the rows to FILE, where they replace older rows "
        f"of their cases; without FILE to {RESULTS}/WHAT_DEVICE.csv (peers_DEVICE.csv with --peers); - is the standard "
        "output"
    )  # fmt: skip
    parser.add_argument(
        "--peers", action="store_true", help="with prefix: time the attention alone, next to FlashAttention-3 (from "
        "vllm, flash_attn_interface or the file that KVGATHER_FA3 names) and FlashInfer, if they are installed",
    )  # fmt: skip
    parser.add_argument(
        "--commit", metavar="TEXT", help="commit to record in the rows; default: KVGATHER_COMMIT, or git's HEAD"
    )  # fmt: skip
    parser.add_argument("--contexts", metavar="N,…", help=f"with {PARALLEL}: cached tokens of its cases")
    parser.add_argument("--new", metavar="N,…", help=f"with {PARALLEL}: new tokens of its cases")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run a benchmark, print the rows of each case as soon as they are measured, and write them to a CSV file."""
    from ..bench.keep import RowWriter
    from ..bench.machine import COMMIT, default_csv
    from ..bench.progress import Progress
    from ..device import resolve_device

    what = arguments.what
    if arguments.peers:
        if what != "prefix":
            raise ValueError(f"--peers with {what}; accepted: kvgather bench prefix --peers")
        what = "peers"
    if what == PARALLEL:
        from ..bench.parallel import command

        return command(arguments)
    if arguments.contexts is not None or arguments.new is not None:
        raise ValueError(f"--contexts or --new with {what}; accepted: kvgather bench {PARALLEL}")
    device = resolve_device(arguments.device, "--device")
    if arguments.commit:
        os.environ[COMMIT] = arguments.commit
    benchmark = importlib.import_module(f"..bench.{what}", __package__)
    path = None if arguments.csv is None else Path(arguments.csv or default_csv(what, device.type))
    with Progress() as progress, RowWriter(path, progress) as keep:
        rows = benchmark.run(device, only=arguments.case, seconds=arguments.seconds, progress=progress, keep=keep)
        if hasattr(benchmark, "summary") and (summary := benchmark.summary(rows)):
            keep.say(f"\n{summary}")
    return OK
