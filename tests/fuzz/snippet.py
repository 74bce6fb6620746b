"""A call as a Python script of its own."""

from __future__ import annotations

import ast

from tests.fuzz.case import GOOD, PREAMBLE, Case


def snippet(case: Case) -> str:
    """Python that builds the arguments and makes the call."""
    body = "\n".join([*case.lines, f"print({case.call})"])
    wanted = "a right result" if case.verdict == GOOD else f"an error that names one of {', '.join(sorted(case.names))}"
    if case.verdict not in (GOOD, "bad"):
        wanted = f"a right result, or {wanted}"
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    lines = []
    for part in ast.parse(PREAMBLE).body:
        if isinstance(part, ast.FunctionDef):
            if part.name in used | {"source"}:
                lines.append("\n" + ast.unparse(part))
        elif isinstance(part, ast.ImportFrom):
            if any(alias.name in used for alias in part.names):
                lines.append(ast.unparse(part))
        else:
            lines.append(ast.unparse(part))
    return "\n".join([*lines, "", body, f"# expected: {wanted}"])
