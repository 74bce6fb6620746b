"""The command line: `kvgather doctor`, `kvgather crash`, `kvgather bench`; also as `python -m kvgather`.

Exit status of every command: 0 as it should be, 1 not as it should be, 2 wrong usage (or what was asked for cannot run
here), 3 the command itself failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Commands = Any  # what add_subparsers returns has no public name
OK, NOT_AS_EXPECTED, USAGE, FAILED, INTERRUPTED = 0, 1, 2, 3, 130

BENCHMARKS = {
    "gather": "the gather, planned and as engines call it, against upstream's form and the memory's limit",
    "steps": "the kernels of chapter 07, each one change from the one before",
    "host": "how long one eager call keeps the host busy, in raw launches of upstream's form",
    "prefix": "the prefix path both ways, the choice between them, one program per (token, head), and the limits",
}
"""What `kvgather bench` measures: each is the `run` of the module of its name in `kvgather.bench`."""
STDOUT = "-"


def doctor(arguments: argparse.Namespace) -> int:
    """What this machine can run."""
    from .device import doctor as look

    print(look())
    return OK


def crash(arguments: argparse.Namespace) -> int:
    """Run the crash cases, print what became of each, and compare with what should."""
    from .files import check_replaceable
    from .lab import crash as lab

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
    said = sys.stderr if arguments.json == STDOUT else sys.stdout
    for outcome in lab.run_all(cases, timeout=arguments.timeout):
        outcomes.append(outcome)
        print(f"{outcome.case:<{width}}  {lab.describe(outcome)}", file=said, flush=True)
    if arguments.json == STDOUT:
        print(lab.as_json(outcomes), end="")
    elif arguments.json is not None:
        lab.save(outcomes, arguments.json)
    if all(outcome.as_expected for outcome in outcomes):
        print(f"all {len(outcomes)} outcomes are as expected", file=said)
        return OK
    return FAILED if any(outcome.kind in ("failed", "timeout") for outcome in outcomes) else NOT_AS_EXPECTED


def _list_cases(device: str) -> int:
    """Print the cases of a device, whether this machine can run them or not, and what is expected of each."""
    from .lab import crash as lab

    chosen = [case for case in lab.CASES.values() if device in ("all", case.device)]
    width = max(len(case.name) for case in chosen)
    for case in chosen:
        print(f"{case.name:<{width}}  expected: {' or '.join(case.expected)}")
    return OK


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print each case's rows when they are there, and keep them in a CSV file."""
    from .bench.keep import RowWriter
    from .bench.machine import COMMIT
    from .bench.progress import Progress
    from .device import resolve_device

    device = resolve_device(arguments.device, "--device")
    if arguments.commit:
        os.environ[COMMIT] = arguments.commit
    what = importlib.import_module(f".bench.{arguments.what}", __package__)
    path = None if arguments.csv is None else Path(arguments.csv or _default_csv(arguments.what, device.type))
    with Progress() as progress, RowWriter(path, progress) as keep:
        rows = what.run(device, only=arguments.case, seconds=arguments.seconds, progress=progress, keep=keep)
        if hasattr(what, "summary") and (said := what.summary(rows)):
            keep.say(f"\n{said}")
    return OK


def _default_csv(what: str, device_type: str) -> Path:
    from .bench.machine import machine
    from .bench.report import slug
    from .bench.results import RESULTS

    device = "cpu" if device_type == "cpu" else slug(machine(device_type)["device"])
    return RESULTS / f"{what}_{device}.csv"


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="say what this machine can run, and how")
    parser.set_defaults(run=doctor)


def _add_crash(commands: Commands) -> None:
    parser = commands.add_parser(
        "crash",
        help="repeat the crash in child processes, and show that it is fixed",
        description="Runs the gather as it was and with upstream's fix, both in our rewrite, and as it is, with a "
        "scale that is guarded (followed by memory that faults) or not, each in a child process of its own.",
        epilog="exit status: 0 every outcome is as expected; 1 some are not; 2 wrong usage, or no such device here; "
        "3 a child failed for another reason or ran out of time; 130 interrupted",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all there are")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; may be given several times")
    parser.add_argument("--json", metavar="FILE", help="also write the outcomes to FILE; - is the standard output")
    parser.add_argument("--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="per case; default: 120")
    parser.add_argument("--list", action="store_true", help="only print the cases, and what is expected of each")
    parser.set_defaults(run=crash)


def _add_bench(commands: Commands) -> None:
    from .bench.results import RESULTS

    parser = commands.add_parser(
        "bench",
        help="measure the gather, the prefix path and host times, against upstream's form and the memory's limit",
        description="Checks each implementation against the reference, then times it; on a GPU in CUDA graphs, over "
        "inputs that do not fit in its cache.",
    )
    told = "; ".join(f"{what}: {about}" for what, about in BENCHMARKS.items())
    parser.add_argument("what", choices=tuple(BENCHMARKS), metavar="WHAT", help=told)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    parser.add_argument("--seconds", type=_seconds, default=0.2, help="about how long for each; default: 0.2")
    parser.add_argument(
        "--csv", metavar="FILE", nargs="?", const="", help="also write the rows to FILE, in place of older ones of "
        f"its cases; without FILE to {RESULTS}/WHAT_DEVICE.csv; - is the standard output"
    )  # fmt: skip
    parser.add_argument(
        "--commit", metavar="TEXT", help="the commit for the rows; default: the environment's KVGATHER_COMMIT, or git's"
    )  # fmt: skip
    parser.set_defaults(run=bench)


def _seconds(text: str) -> float:
    from .lab.child import MAX_SECONDS

    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is not a time; accepted: seconds above 0, at most {MAX_SECONDS:,.0f}")
    return seconds


def _version() -> str:
    """This package's version, from its metadata, or from the clone that it runs in."""
    import importlib.metadata
    import tomllib

    clone = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if clone.is_file():
        project = tomllib.loads(clone.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "kvgather":
            return str(project["version"])
    try:
        return importlib.metadata.version("kvgather")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


COMMANDS: tuple[Callable[[Commands], None], ...] = (_add_doctor, _add_crash, _add_bench)


class _Parser(argparse.ArgumentParser):
    """Errors are one line on stderr."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, without the program's name; None takes the process's.

    Returns:
        The exit status.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # at exit it would be too late to say anything about it
    except BrokenPipeError:  # whoever read, such as head, has enough
        _discard_stdout()
        return OK
    except OSError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        _discard_stdout()
        return FAILED


def _discard_stdout() -> None:
    """Let what is still to be written go nowhere, or Python reports at exit that it cannot write it."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="kvgather", description="Gather a paged FP8 KV cache; see what went wrong before.")
    parser.add_argument("--version", action="version", version=f"kvgather {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, TypeError) as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return USAGE
    except ArithmeticError as error:  # what was to be measured gives wrong rows
        print(f"kvgather: {error}", file=sys.stderr)
        return NOT_AS_EXPECTED
    except KeyboardInterrupt:
        print("kvgather: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
