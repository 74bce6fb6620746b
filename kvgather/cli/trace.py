"""`kvgather trace`: the accesses of a script's kernels outside their tensors."""

from __future__ import annotations

import argparse
import sys

from .arguments import Commands
from .status import FAILED, NOT_AS_EXPECTED, OK, USAGE


def add(commands: Commands) -> None:
    """Add the command."""
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
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of lines; accepted: 1 or more")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run a script with its kernels in Triton's interpreter, and report the accesses outside their tensors."""
    from ..lab.traced_script import run_traced

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
