"""The command line, `kvgather doctor | crash | trace | bench | progress | serve | replay`, or `python -m kvgather`.

Each command has a module here with its arguments and its action; those of `serve` and `replay` are in
`kvgather.replay`. What a command runs is imported when it runs: `kvgather --help` is quick.

Exit status of every command: 0 the results are as expected, 1 they are not, 2 wrong usage or a request that this
machine cannot run, 3 the command failed, 130 interrupted.
"""

from .entry import main
from .status import FAILED, INTERRUPTED, NOT_AS_EXPECTED, OK, USAGE

__all__ = ["FAILED", "INTERRUPTED", "NOT_AS_EXPECTED", "OK", "USAGE", "main"]
