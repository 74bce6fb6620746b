"""`kvgather crash`: the crash cases, or the map of block ids that fault."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .arguments import STDOUT, Commands, seconds
from .status import FAILED, NOT_AS_EXPECTED, OK


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "crash",
        help="reproduce the crash in child processes, and show that it is fixed",
        description="Runs three gathers: the one before the fix and the one with upstream's fix, both in our rewrite, "
        "and the package's own. The scale is guarded (followed by memory that faults) or not. Each case runs in a "
        "child process of its own.",
        epilog="exit status: 0 every outcome is as expected; 1 some are not; 2 wrong usage, or no such device here; "
        "3 a child failed for another reason or ran out of time; 130 interrupted",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all of this machine")
    parser.add_argument("--case", action="append", metavar="NAME", help="run only this case; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="also write the outcomes to FILE; - is the standard output")
    parser.add_argument("--timeout", type=seconds, default=120.0, metavar="SECONDS", help="per case; default: 120")
    parser.add_argument("--list", action="store_true", help="print the cases and the expected outcomes, and run none")
    parser.add_argument(
        "--map", action="store_true", help="run no case, but the gather before the fix with an ordinary scale, for a "
        "series of block ids: which of them fault, and which call reports it",
    )  # fmt: skip
    parser.add_argument(
        "--csv", metavar="FILE", nargs="?", const="", help="with --map: also write the points to FILE; without FILE to "
        "benchmarks/results/crash_map_DEVICE.csv; - is the standard output",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="TEXT", help="with --map: commit to record, as in bench")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the crash cases, print the outcome of each, and compare the outcomes with the expected ones."""
    from ..files import check_replaceable
    from ..lab import crash as lab

    if arguments.map:
        return _crash_map(arguments)
    if arguments.csv is not None or arguments.commit is not None:
        raise lab.CrashError("--csv or --commit without --map; accepted: both with --map, --json without it")
    if arguments.list:
        return _list_cases(arguments.device)
    cases = arguments.case or lab.names(arguments.device)
    for name in cases:
        if name not in lab.CASES:
            raise lab.CrashError(f"--case is {name!r}; accepted: {', '.join(lab.CASES)}")
    if arguments.json not in (None, STDOUT):
        check_replaceable(Path(arguments.json))
    outcomes = []
    width = max(map(len, cases))
    messages = sys.stderr if arguments.json == STDOUT else sys.stdout
    for outcome in lab.run_all(cases, timeout=arguments.timeout):
        outcomes.append(outcome)
        print(f"{outcome.case:<{width}}  {lab.describe(outcome)}", file=messages, flush=True)
    if arguments.json == STDOUT:
        print(lab.as_json(outcomes), end="")
    elif arguments.json is not None:
        lab.save(outcomes, arguments.json)
    if all(outcome.as_expected for outcome in outcomes):
        print(f"all {len(outcomes)} outcomes are as expected", file=messages)
        return OK
    return FAILED if any(outcome.kind in ("failed", "timeout") for outcome in outcomes) else NOT_AS_EXPECTED


def _list_cases(device: str) -> int:
    """Print the cases of a device and the expected outcomes of each, also those that this machine cannot run."""
    from ..lab import crash as lab

    cases = [case for case in lab.CASES.values() if device in ("all", case.device)]
    width = max(len(case.name) for case in cases)
    for case in cases:
        print(f"{case.name:<{width}}  expected: {' or '.join(case.expected)}")
    return OK


def _crash_map(arguments: argparse.Namespace) -> int:
    """Gather with an ordinary scalar for each of a series of block ids, print the points, and write them to a file."""
    from ..bench.machine import COMMIT, default_csv, machine
    from ..device import has_gpu
    from ..files import check_replaceable, replace_text
    from ..lab import crash as lab
    from ..lab.crash_map import as_csv, run_map

    if arguments.case or arguments.list or arguments.json is not None:
        raise lab.CrashError("--map with --case, --list or --json; accepted: --device, --csv, --commit, --timeout")
    if arguments.device == "cuda":
        lab.names("cuda")  # raises without a GPU
    device = "cuda" if arguments.device != "cpu" and has_gpu() else "cpu"
    if arguments.commit:
        os.environ[COMMIT] = arguments.commit
    path = None if arguments.csv is None else Path(arguments.csv or default_csv("crash_map", device))
    to_stdout = path == Path(STDOUT)
    if path is not None and not to_stdout:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(path)
    points = []
    for point in run_map(device, machine(device), timeout=arguments.timeout):
        points.append(point)
        print(point, file=sys.stderr if to_stdout else sys.stdout, flush=True)
        if path is not None and not to_stdout:
            replace_text(path, as_csv(points))
    if to_stdout:
        print(as_csv(points), end="")
    return FAILED if any(point.outcome in ("failed", "timeout") for point in points) else OK
