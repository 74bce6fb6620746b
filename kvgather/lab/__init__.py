"""The subject of the workbook: the gather before the fix, and the tools that show its bug.

Only lab, bench, workbook, the command line and tests import this package. `trace`, `fence` and `isolated` are general
tools: they work on any Triton kernel.
"""
