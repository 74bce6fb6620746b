"""`python -m kvgather.lab.hunt` lists the bugs; with names, it shows what the user of each kernel sees."""

from __future__ import annotations

import argparse
import textwrap

from . import BUGS
from .script import script_outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvgather.lab.hunt", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"one of {', '.join(BUGS)}; without a name, the list of the reports")
    names = parser.parse_args().name
    for name in names:
        if name not in BUGS:
            parser.error(f"name is {name!r}; accepted: {', '.join(BUGS)}")
    for bug in map(BUGS.__getitem__, names or BUGS):
        print(f"{bug.name}: {bug.title}, difficulty {bug.difficulty} of 4")
        print(textwrap.fill(bug.report, 110, initial_indent="    ", subsequent_indent="    "))
        for outcome in script_outcomes([bug]) if names else ():
            print(f"  {outcome}", flush=True)


if __name__ == "__main__":
    main()
