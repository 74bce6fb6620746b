"""Every test marked `gpu`, each file in processes of its own: `python3 tools/gpu_suite.py [--out FILE]`.

A CUDA context that dies takes its process with it, and so costs what is left of one file, not of the run. Several
processes run at a time, the longest first, over one cache of compiled kernels; a file that takes long is cut into
shards, always at the same tests. What is left of a process that dies or hangs counts as errors, with the reason.

The record says how many tests passed, failed and were skipped, why, and on which device: `make test-gpu` writes
`benchmarks/results/gpu_suite.json`. The exit status is 0 if tests passed and none failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpu_processes import End, Shard, candidates, collect, cut, run_shards
from gpu_record import ROOT, cores, machine, write

RECORD = ROOT / "benchmarks" / "results" / "gpu_suite.json"
WORDS = {"failed": "failed", "passed": "passed", "skipped": "skipped", "errors": "error"}
"""An outcome's name in the record, and pytest's word for it, in the order of its last line."""
RESERVED_GIGABYTES = 6


class Suite:
    """Prints what ends, and remembers it for the record.

    Attributes:
        ends: what became of each test so far.
        files: by file, how many tests ended, and how long its processes took together.
        log: what the processes print is appended to it; None keeps that of those with failures alone, on the screen.
    """

    def __init__(self, log: Path | None) -> None:
        self.ends: list[End] = []
        self.files: dict[str, dict[str, float]] = {}
        self.log = log

    def ended(self, shard: Shard, ends: list[End], seconds: float, folder: Path) -> None:
        """One process ended."""
        self.ends += ends
        file = self.files.setdefault(shard.file, {"tests": 0, "seconds": 0.0})
        file["tests"] += len(ends)
        file["seconds"] = round(file["seconds"] + seconds, 1)
        print(f"{shard.name}: {told(counts(ends))} in {seconds:.1f}s", flush=True)
        output = folder / "output"
        if self.log is not None and output.exists():
            times = "".join(f"{end.seconds:8.2f}s {end.outcome} {end.id}\n" for end in ends)
            with self.log.open("a") as log:
                log.write(f"{'=' * 20} {shard.name}\n{output.read_text(errors='replace')}\n{times}")

    def summary(self, slowest: int = 10) -> None:
        """Every failure with its reason, every reason to skip, and what took longest."""
        for end in sorted(self.ends, key=lambda end: end.seconds)[: -slowest - 1 : -1]:
            print(f"{end.seconds:8.1f}s {end.id}")
        for reason, count in skips(self.ends).items():
            print(f"SKIPPED [{count}] {reason}")
        for end in self.ends:
            if end.outcome in ("failed", "errors"):
                print(f"{'FAILED' if end.outcome == 'failed' else 'ERROR'} {end.id} - {end.reason}")


def counts(ends: Sequence[End]) -> dict[str, int]:
    """How many tests passed, failed, could not be run, were skipped."""
    found = Counter(end.outcome for end in ends)
    return {outcome: found[outcome] for outcome in ("passed", "failed", "errors", "skipped")}


def skips(ends: Sequence[End]) -> dict[str, int]:
    """How many tests were skipped for each reason, the most frequent first."""
    return dict(Counter(end.reason for end in ends if end.outcome == "skipped").most_common())


def told(numbers: dict[str, int]) -> str:
    """Such as "1 failed, 700 passed, 2 errors", as pytest says it."""
    parts = [
        f"{numbers[outcome]} {word}{'s' if outcome == 'errors' and numbers[outcome] > 1 else ''}"
        for outcome, word in WORDS.items()
        if numbers[outcome]
    ]
    return ", ".join(parts) or "no tests ran"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.py", description="Run every test marked gpu, to the end.")
    parser.add_argument("paths", nargs="*", default=["tests"], help="files or folders, from the root; default: tests")
    parser.add_argument("--out", type=Path, help="the record; default: benchmarks/results/gpu_suite.json")
    parser.add_argument("--log", type=Path, help="a file for what the processes print, and each test's seconds")
    parser.add_argument("--workers", type=int, default=cores(), help="processes at a time")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one test, after which it is killed")
    parser.add_argument("--within", type=float, default=3600.0, help="seconds for all; what is left is an error")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)  # the tests of this module
    options = parser.parse_args(given)
    if options.out is None and options.paths == ["tests"]:
        options.out = RECORD
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    options, begun = arguments(given), time.monotonic()
    root = options.root.resolve()
    gigabytes, where = machine()
    if not gigabytes and options.out == RECORD:
        print("torch sees no GPU here; --out FILE runs the tests all the same, which then skip", file=sys.stderr)
        return 2
    suite = Suite(options.log)
    with tempfile.TemporaryDirectory(prefix="gpu_suite") as folder:
        work = Path(folder)
        tests, broken = collect(root, candidates(root, options.paths), work, options.limit)
        suite.ends += broken
        shards = [shard for file, ids in tests.items() for shard in cut(file, ids)]
        print(f"{sum(map(len, tests.values()))} tests of {len(tests)} files in {len(shards)} processes, "
              f"{options.workers} at a time, on {where['device']}", flush=True)  # fmt: skip
        run_shards(
            root, shards, work, workers=options.workers, limit=options.limit, until=begun + options.within,
            gigabytes=gigabytes - RESERVED_GIGABYTES if gigabytes else float("inf"), ended=suite.ended,
        )  # fmt: skip
    seconds, numbers = time.monotonic() - begun, counts(suite.ends)
    suite.summary()
    if options.out is not None:
        record = numbers | where | {"seconds": round(seconds, 1), "skips": skips(suite.ends)}
        write(record | {"files": dict(sorted(suite.files.items()))}, options.out)
    print(f"{told(numbers)} in {seconds:.1f}s")
    return 0 if numbers["passed"] and not numbers["failed"] + numbers["errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
