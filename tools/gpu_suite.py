"""Runs every test marked `gpu`, each file in processes of its own: `python3 tools/gpu_suite.py [--out FILE]`.

A dead CUDA context makes its process useless, so that only the remaining tests of one file are lost. Processes run in
parallel, the longest first, and share one cache of compiled kernels. Long files are divided into shards, always at the
same tests. The remaining tests of a process that dies or hangs count as errors, with the reason.

The record contains the numbers of passed, failed and skipped tests, the reasons, and the GPUs: `make test-gpu` writes
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
"""An outcome's name in the record, and its name in pytest's summary line, in the order of that line."""
RESERVED_GIGABYTES = 6


class Suite:
    """Prints the results of finished shards, and collects them for the record.

    Attributes:
        ends: the ends of all tests so far.
        files: for each file, the number of finished tests, and the seconds of all its processes.
        log: a file to which the output of each process is appended; None writes no log.
    """

    def __init__(self, log: Path | None) -> None:
        self.ends: list[End] = []
        self.files: dict[str, dict[str, float]] = {}
        self.log = log

    def ended(self, shard: Shard, ends: list[End], seconds: float, folder: Path) -> None:
        """Print and collect the results of a process that has ended."""
        self.ends += ends
        file = self.files.setdefault(shard.file, {"tests": 0, "seconds": 0.0})
        file["tests"] += len(ends)
        file["seconds"] = round(file["seconds"] + seconds, 1)
        print(f"{shard.name}: {summary_line(counts(ends))} in {seconds:.1f}s", flush=True)
        output = folder / "output"
        if self.log is not None and output.exists():
            times = "".join(f"{end.seconds:8.2f}s {end.outcome} {end.id}\n" for end in ends)
            with self.log.open("a") as log:
                log.write(f"{'=' * 20} {shard.name}\n{output.read_text(errors='replace')}\n{times}")

    def summary(self, slowest: int = 10) -> None:
        """Print the slowest tests, every reason to skip, and every failure with its reason."""
        for end in sorted(self.ends, key=lambda end: end.seconds)[: -slowest - 1 : -1]:
            print(f"{end.seconds:8.1f}s {end.id}")
        for reason, count in skips(self.ends).items():
            print(f"SKIPPED [{count}] {reason}")
        for end in self.ends:
            if end.outcome in ("failed", "errors"):
                print(f"{'FAILED' if end.outcome == 'failed' else 'ERROR'} {end.id} - {end.reason}")


def counts(ends: Sequence[End]) -> dict[str, int]:
    """The numbers of tests that passed, failed, could not run, and were skipped."""
    outcomes = Counter(end.outcome for end in ends)
    return {outcome: outcomes[outcome] for outcome in ("passed", "failed", "errors", "skipped")}


def skips(ends: Sequence[End]) -> dict[str, int]:
    """The number of skipped tests for each reason, the most frequent first."""
    return dict(Counter(end.reason for end in ends if end.outcome == "skipped").most_common())


def summary_line(numbers: dict[str, int]) -> str:
    """Counts in the form of pytest's summary line, such as "1 failed, 700 passed, 2 errors"."""
    parts = [
        f"{numbers[outcome]} {word}{'s' if outcome == 'errors' and numbers[outcome] > 1 else ''}"
        for outcome, word in WORDS.items()
        if numbers[outcome]
    ]
    return ", ".join(parts) or "no tests ran"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.py", description="Run every test marked gpu.")
    parser.add_argument("paths", nargs="*", default=["tests"], help="files or folders, from the root; default: tests")
    parser.add_argument("--out", type=Path, help="the record; default: benchmarks/results/gpu_suite.json")
    parser.add_argument("--log", type=Path, help="a file for the output of the processes and the seconds of each test")
    parser.add_argument("--workers", type=int, default=cores(), help="number of parallel processes")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which one test is killed")
    parser.add_argument("--within", type=float, default=3600.0, help="seconds for all tests; the rest count as errors")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)  # for the tests of this module
    options = parser.parse_args(argv)
    if options.out is None and options.paths == ["tests"]:
        options.out = RECORD
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite, and return the exit status."""
    options, start_time = arguments(argv), time.monotonic()
    root = options.root.resolve()
    gigabytes, gpus, description = machine()
    if not gigabytes and options.out == RECORD:
        print("torch sees no GPU here; with --out FILE the tests run and are skipped", file=sys.stderr)
        return 2
    suite = Suite(options.log)
    # Children of a killed test may still write into the folder.
    with tempfile.TemporaryDirectory(prefix="gpu_suite", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        tests, broken = collect(root, candidates(root, options.paths), work, options.limit)
        suite.ends += broken
        shards = [shard for file, ids in tests.items() for shard in cut(file, ids)]
        print(f"{sum(map(len, tests.values()))} tests of {len(tests)} files in {len(shards)} processes, "
              f"{options.workers} at a time, on {description['device']}", flush=True)  # fmt: skip
        run_shards(
            root, shards, work, workers=options.workers, limit=options.limit, until=start_time + options.within,
            gigabytes=gigabytes - RESERVED_GIGABYTES if gigabytes else float("inf"), ended=suite.ended,
        )  # fmt: skip
    seconds, numbers = time.monotonic() - start_time, counts(suite.ends)
    suite.summary()
    if options.out is not None:
        record = numbers | {"gpus": gpus} | description | {"seconds": round(seconds, 1), "skips": skips(suite.ends)}
        write(record | {"files": dict(sorted(suite.files.items()))}, options.out)
    print(f"{summary_line(numbers)} in {seconds:.1f}s")
    return 0 if numbers["passed"] and not numbers["failed"] + numbers["errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
