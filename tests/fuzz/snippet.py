"""A call as a Python script of its own."""

from __future__ import annotations

import ast

from tests.fuzz.case import GOOD, Case
from tests.fuzz.preamble import PREAMBLE

NEEDED = {
    "codes": ("source",), "normal": ("source",), "scales": ("source",), "sparkled": ("source",),
    "of_subclass": ("Named",),
}  # fmt: skip
"""What others of the preamble use."""


def snippet(case: Case) -> str:
    """Python that builds the arguments and makes the call."""
    call = f"print({case.call})"
    if case.surroundings:
        call = f"with {case.surroundings}:\n    result = {case.call}\nprint(result)"
    body = "\n".join([*case.lines, call])
    wanted = "a right result" if case.verdict == GOOD else f"an error that names one of {', '.join(sorted(case.names))}"
    if case.verdict not in (GOOD, "bad"):
        wanted = f"a right result, or {wanted}"
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    lines = []
    for part in ast.parse(PREAMBLE).body:
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
            if part.name in used | {name for user in used for name in NEEDED.get(user, ())}:
                lines.append("\n" + ast.unparse(part))
        elif isinstance(part, ast.ImportFrom):
            if any(alias.name in used | ({"trace"} if "traced" in used else set()) for alias in part.names):
                lines.append(ast.unparse(part))
        else:
            lines.append(ast.unparse(part))
    return "\n".join([*lines, "", body, f"# expected: {wanted}"])
