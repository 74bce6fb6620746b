"""From the command line to an exit status: parse, run one command, report its errors."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from ..replay.commands import COMMANDS as SERVING
from . import bench, crash, doctor, progress, trace
from .arguments import Commands
from .status import FAILED, INTERRUPTED, NOT_AS_EXPECTED, OK, USAGE
from .version import version

COMMANDS: tuple[Callable[[Commands], None], ...] = (
    doctor.add, crash.add, trace.add, bench.add, progress.add, *SERVING,
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
    parser.add_argument("--version", action="version", version=f"kvgather {version()}")
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
