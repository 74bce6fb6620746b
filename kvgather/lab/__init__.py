"""The subject of the workbook: the gather before the fix, and the tools that show its bug.

Only lab, bench, workbook, the command line and tests import this package. `trace`, `fence` and `isolated` are general
tools: they work on any Triton kernel. Modules named in `__all__` are public; the others serve them
and the command line.
"""

__all__ = [
    "assembly",
    "before_fix",
    "crash",
    "crash_map",
    "fence",
    "hunt",
    "isolated",
    "planted",
    "steps",
    "trace",
    "warps",
]
