"""What a reader hands in for a bug: kernels or a launcher, and whether they still are the ones with the bug."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from types import FunctionType
from typing import Any

from .bug import Bug

__all__ = ["WrongKind", "about_signature", "as_functions", "unchanged"]


class WrongKind(TypeError):
    """Neither kernels nor a launcher; the message says what came and what is accepted."""


def as_functions(bug: Bug, answer: Any) -> tuple[Any, ...]:
    """Kernels in the order of `bug.kernels`, or one launcher, as `Bug.run` accepts them.

    Raises:
        WrongKind: the answer is something else.
    """
    accepted = f"accepted: {', '.join(bug.kernels)}, or a launcher with the arguments of {bug.launcher}"
    given = tuple(answer) if isinstance(answer, tuple | list) else (answer,)
    given = tuple(inspect.unwrap(item) if isinstance(item, FunctionType) else item for item in given)
    for item in given:
        if isinstance(item, FunctionType) and any(name.endswith("_ptr") for name in inspect.signature(item).parameters):
            raise WrongKind(f"{item.__name__} has pointers as arguments and no @triton.jit; {accepted}")
    if len(given) == 1 and isinstance(given[0], FunctionType):
        return given
    for item in given:
        if not (hasattr(item, "fn") and hasattr(item, "__getitem__")):
            raise WrongKind(f"fixed is {answer!r:.60}; {accepted}")
    if len(given) != len(bug.kernels):
        count = f"{len(given)} kernel{'s' if len(given) > 1 else ''}"
        raise WrongKind(f"fixed has {count}; {accepted}")
    return given


def unchanged(bug: Bug, functions: tuple[Any, ...]) -> bool:
    """Whether functions have the code of the bug's own, but for comments and annotations."""
    if len(functions) == 1 and isinstance(functions[0], FunctionType):
        launcher = functions[0]
        own = _code(getattr(bug.module, bug.launcher), {"kernel": bug.kernels[0]})
        if _code(launcher) != own:
            return False
    return all(map(_same_kernel, _kernels(bug, functions), bug.functions))


def about_signature(bug: Bug, functions: tuple[Any, ...]) -> str | None:
    """What the registry says to a type in the signature of `unchanged` functions; None if it says nothing."""
    for kernel in _kernels(bug, functions):
        for name, parameter in inspect.signature(kernel.fn).parameters.items():
            kind = re.sub(r"^i(?=\d)", "int", str(parameter.annotation).rpartition(".")[2])
            if f"{name}: {kind}" in bug.ignored:
                return bug.ignored[f"{name}: {kind}"]
    return None


def _kernels(bug: Bug, functions: tuple[Any, ...]) -> tuple[Any, ...]:
    """The kernels among functions, or those that a launcher finds under the names of the bug's own."""
    if len(functions) == 1 and isinstance(functions[0], FunctionType):
        return tuple(functions[0].__globals__.get(name) for name in bug.kernels)
    return functions


def _same_kernel(kernel: Any, own: Any) -> bool:
    if not hasattr(kernel, "fn"):
        return False
    names = [list(inspect.signature(item.fn).parameters) for item in (kernel, own)]
    return names[0] == names[1] and _code(kernel.fn) == _code(own.fn)


def _code(function: Any, names: dict[str, str] | None = None) -> str:
    """The statements of a function without its docstring; `names` are replaced."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError):
        return repr(function)
    if not isinstance(tree, ast.FunctionDef):  # a lambda
        return repr(function)
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Name) and names:
            node.id = names.get(node.id, node.id)
    return "\n".join(map(ast.dump, body))
