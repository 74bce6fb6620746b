"""The hunt: ten kernels, each with one bug that nobody points at, as engines and kernel libraries had them.

A bug runs under each tool of the lab:

    from kvgather.lab import hunt

    bug = hunt.BUGS["slots"]
    print(bug.report)
    with trace() as t:
        bug.run(bug.inputs())
    print(t.report())

`python -m kvgather.lab.hunt slots` shows what the user of the kernel sees. The code to look at is in
`kvgather/lab/hunt/kernels/`, the answers are in `kvgather/lab/hunt/answers/`.
"""

from __future__ import annotations

from .answers import chunk, codes, decode, merge, pages, rows, scales, slots, window, write
from .bug import TOOLS, Bug, Thread, geometry_label

__all__ = ["BUGS", "TOOLS", "Bug", "Thread", "geometry_label"]

BUGS: dict[str, Bug] = {
    module.BUG.name: module.BUG for module in (slots, pages, chunk, window, merge, decode, rows, scales, codes, write)
}
"""By name, from easy to hard."""
