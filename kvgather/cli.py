"""The command line, `kvgather doctor | crash | trace | bench | progress | serve | replay`, or `python -m kvgather`.

Exit status of every command: 0 the results are as expected, 1 they are not, 2 wrong usage or a request that this
machine cannot run, 3 the command failed, 130 interrupted.
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

Commands = Any  # the return type of add_subparsers has no public name
OK, NOT_AS_EXPECTED, USAGE, FAILED, INTERRUPTED = 0, 1, 2, 3, 130

PARALLEL = "parallel"
BENCHMARKS = {
    "gather": "the gather, planned and as engines call it, against upstream's form and the memory's limit",
    "steps": "the kernels of chapter 07, each one change from the one before",
    "host": "how long one eager call keeps the host busy, in raw launches of upstream's form",
    "prefix": "the prefix path both ways, the choice between them, one program per (token, head), and the limits",
    PARALLEL: "one long context on several GPUs, against one GPU; torchrun starts it",
}
"""The benchmarks of `kvgather bench`: each is the function `run` of the module `kvgather.bench.NAME`."""
STDOUT = "-"


def doctor(arguments: argparse.Namespace) -> int:
    """Print what this machine can run."""
    from .device import doctor as report

    print(report())
    return OK


def crash(arguments: argparse.Namespace) -> int:
    """Run the crash cases, print the outcome of each, and compare the outcomes with the expected ones."""
    from .files import check_replaceable
    from .lab import crash as lab

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
    from .lab import crash as lab

    cases = [case for case in lab.CASES.values() if device in ("all", case.device)]
    width = max(len(case.name) for case in cases)
    for case in cases:
        print(f"{case.name:<{width}}  expected: {' or '.join(case.expected)}")
    return OK


def _crash_map(arguments: argparse.Namespace) -> int:
    """Gather with an ordinary scalar for each of a series of block ids, print the points, and write them to a file."""
    from .bench.machine import COMMIT, default_csv, machine
    from .device import has_gpu
    from .files import check_replaceable, replace_text
    from .lab import crash as lab
    from .lab.crash_map import as_csv, run_map

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


def trace(arguments: argparse.Namespace) -> int:
    """Run a script with its kernels in Triton's interpreter, and report the accesses outside their tensors."""
    from .lab.traced_script import run_traced

    traced = run_traced(arguments.script, arguments.arguments, strict=arguments.strict, unwritten=arguments.unwritten)
    sys.stdout.flush()
    if traced.failure:
        print(traced.failure.rstrip(), file=sys.stderr)
    if traced.trace.launches:
        print(traced.trace.report(arguments.limit))
    else:
        print(f"{traced.script.name} launched no Triton kernel in this process: nothing was checked")
    if traced.interrupted:
        raise KeyboardInterrupt
    if traced.wants_gpu:
        why = 'wants a GPU, and torch sees none here; accepted: tensors on "cpu", where kernels run in the interpreter'
        print(f"kvgather: {traced.script.name} {why}", file=sys.stderr)
        return USAGE
    if traced.failure:
        return FAILED
    return USAGE if not traced.trace.launches else OK if traced.clean else NOT_AS_EXPECTED


def bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark, print the rows of each case as soon as they are measured, and write them to a CSV file."""
    from .bench.keep import RowWriter
    from .bench.machine import COMMIT, default_csv
    from .bench.progress import Progress
    from .device import resolve_device

    what = arguments.what
    if arguments.peers:
        if what != "prefix":
            raise ValueError(f"--peers with {what}; accepted: kvgather bench prefix --peers")
        what = "peers"
    if what == PARALLEL:
        from .bench.parallel import command

        return command(arguments)
    if arguments.contexts is not None or arguments.new is not None:
        raise ValueError(f"--contexts or --new with {what}; accepted: kvgather bench {PARALLEL}")
    device = resolve_device(arguments.device, "--device")
    if arguments.commit:
        os.environ[COMMIT] = arguments.commit
    benchmark = importlib.import_module(f".bench.{what}", __package__)
    path = None if arguments.csv is None else Path(arguments.csv or default_csv(what, device.type))
    with Progress() as progress, RowWriter(path, progress) as keep:
        rows = benchmark.run(device, only=arguments.case, seconds=arguments.seconds, progress=progress, keep=keep)
        if hasattr(benchmark, "summary") and (summary := benchmark.summary(rows)):
            keep.say(f"\n{summary}")
    return OK


def progress(arguments: argparse.Namespace) -> int:
    """Print how many exercises of each chapter are solved in the reader's copy of the notebooks."""
    from .files import check_replaceable, replace_text
    from .workbook import launch
    from .workbook import progress as record

    root = launch.find_root()
    if arguments.json not in (None, STDOUT):
        check_replaceable(Path(arguments.json))
    folder = root / launch.COPIES
    try:
        rows = record.overview(root, record.solved(folder))
    except record.ProgressError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        return FAILED
    if arguments.json == STDOUT:
        print(record.as_json(rows), end="")
        return OK
    if arguments.json is not None:
        replace_text(Path(arguments.json), record.as_json(rows))
    print(record.report(rows))
    if not folder.is_dir():
        print(f"There is no {launch.COPIES} folder yet: `make lab` makes it and opens the first chapter.")
    return OK


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="print what this machine can run")
    parser.set_defaults(run=doctor)


def _add_crash(commands: Commands) -> None:
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
    parser.add_argument("--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="per case; default: 120")
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
    parser.set_defaults(run=crash)


def _add_trace(commands: Commands) -> None:
    parser = commands.add_parser(
        "trace",
        help="run a script of yours, and report every access of its Triton kernels outside their tensors",
        usage="kvgather trace [options] SCRIPT.py [arguments]",
        description="Runs the script, unchanged, with every kernel in Triton's interpreter, on tensors of the CPU or "
        "the GPU. Reports accesses outside their tensor, elements that two programs of a launch store, and, on "
        "request, loads of memory that nothing wrote. Kernels launched in other processes are not seen.",
        epilog="exit status: 0 nothing was found; 1 something was; 2 wrong usage, a script that launches no kernel, or "
        "one that wants a GPU where there is none; 3 the script raised an exception, or exited with another status "
        "than 0 (what was found until then is printed); 130 interrupted",
    )
    parser.add_argument("script", metavar="SCRIPT.py", help="a Python file, run as python would run it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="everything behind SCRIPT.py is the script's own")
    parser.add_argument(
        "--strict", action=argparse.BooleanOptionalAction, default=None, help="whether an element between the first "
        "and the last of a view with gaps, and not part of it, is outside; default: it is",
    )  # fmt: skip
    parser.add_argument("--unwritten", action="store_true", help="also report loads of memory that nothing wrote")
    parser.add_argument("--limit", type=_count, default=20, metavar="N", help="lines of each kind; default: 20")
    parser.set_defaults(run=trace)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of lines; accepted: 1 or more")
    return int(text)


def _add_progress(commands: Commands) -> None:
    parser = commands.add_parser(
        "progress",
        help="print which exercises of the workbook you have solved",
        description="A check that says `correct` in my-notebooks, the copy of the chapters that `make lab` opens, "
        "marks its exercise as solved.",
        epilog="exit status: 0 also if nothing is solved yet; 2 wrong usage, or no clone with the chapters; 3 the "
        "record is damaged or cannot be read",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE; - is the standard output alone")
    parser.set_defaults(run=progress)


def _add_bench(commands: Commands) -> None:
    from .bench.results import RESULTS

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
    parser.add_argument("--seconds", type=_seconds, default=0.2, help="approximate time per measurement; default: 0.2")
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
    parser.set_defaults(run=bench)


def _add_serving(commands: Commands) -> None:
    from .replay.commands import COMMANDS as added

    for add in added:
        add(commands)


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
    """This package's version, from the clone that it runs in, or from the metadata of an installed package."""
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


COMMANDS: tuple[Callable[[Commands], None], ...] = (
    _add_doctor, _add_crash, _add_trace, _add_bench, _add_progress, _add_serving,
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """A parser that prints each error as one line on stderr."""

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
            sys.stdout.flush()  # raises here, where main can report the error, and not at exit
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        _discard_stdout()
        return OK
    except OSError as error:
        print(f"kvgather: {error}", file=sys.stderr)
        _discard_stdout()
        return FAILED


def _discard_stdout() -> None:
    """Redirect stdout to the null device, because Python's flush at exit would report the write error again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="kvgather", description="Gather a paged FP8 KV cache, and reproduce the crash that it fixes.")
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
    except ArithmeticError as error:  # a measured implementation gives wrong rows
        print(f"kvgather: {error}", file=sys.stderr)
        return NOT_AS_EXPECTED
    except KeyboardInterrupt:
        print("kvgather: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
