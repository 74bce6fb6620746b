"""A package read as a house: which module imports which, and what that breaks. Nothing of the package is run."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Order = Sequence[frozenset[str] | set[str]]
"""Parts of the package from the lowest floor up. A part is a folder or a module at the top, "" the package itself."""


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name as alias`, or `import module as alias`, where `name` is ""."""

    line: int
    module: str
    name: str
    alias: str


@dataclass(frozen=True)
class Module:
    """One file of a package, parsed."""

    name: str
    tree: ast.Module
    is_package: bool

    @property
    def part(self) -> str:
        return part_of(self.name)

    @property
    def folder(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @cached_property
    def defines(self) -> frozenset[str]:
        """Names of its functions and classes, and of what it assigns, attributes included."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
        return frozenset(names)


def part_of(module: str) -> str:
    """The part that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


class House:
    """The modules of a package, and the imports among them.

    Every import counts: at the top of a file, in a function, under TYPE_CHECKING, and `import_module` of a text.
    """

    def __init__(self, root: Path, package: str) -> None:
        self.package = package
        self.modules: dict[str, Module] = {}
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            self.modules[name] = Module(name, ast.parse(path.read_text(encoding="utf-8")), is_package)

    def imports(self, module: Module) -> Iterator[Import]:
        """What a module imports of its package; a name that is itself a module counts as that module."""
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._known(node.lineno, alias.name, "", alias.asname or "")
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(module, "." * node.level + (node.module or ""))
                for alias in node.names:
                    bound, inner = alias.asname or alias.name, f"{source}.{alias.name}"
                    if inner in self.modules:
                        yield from self._known(node.lineno, inner, "", bound)
                    else:
                        yield from self._known(node.lineno, source, alias.name, bound)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if function == "import_module":
                    yield from self._known(node.lineno, self._absolute(module, str(node.args[0].value)), "", "")

    def _absolute(self, module: Module, name: str) -> str:
        level = len(name) - len(name.lstrip("."))
        if level == 0:
            return name
        base = module.folder.split(".")
        return ".".join([*base[: len(base) - level + 1], *filter(None, [name[level:]])])

    def _known(self, line: int, module: str, name: str, alias: str) -> Iterator[Import]:
        if module in self.modules:
            yield Import(line, module, name, alias)

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """The modules that each module imports."""
        return {name: {one.module for one in self.imports(module)} for name, module in self.modules.items()}

    def circles(self) -> list[str]:
        """One circle of imports, if there is any."""
        try:
            graphlib.TopologicalSorter(self.graph).prepare()
        except graphlib.CycleError as error:
            return [" imports ".join(reversed(error.args[1]))]
        return []

    def upward(self, order: Order) -> list[str]:
        """Imports of a part that is on a higher floor, or of another part on the same one; parts without a floor."""
        floors = {part: floor for floor, parts in enumerate(order) for part in parts}
        parts = {module.part for module in self.modules.values()}
        found = [f"{self.package}.{part} has no floor in the order" for part in sorted(parts - floors.keys())]
        found += [f"{part} is in the order and not in {self.package}" for part in sorted(floors.keys() - parts)]
        for module in self.modules.values():
            for one in self.imports(module):
                above, below = module.part, part_of(one.module)
                if above != below and above in floors and below in floors and floors[below] >= floors[above]:
                    found.append(f"{module.name}:{one.line} imports {one.module}, which is not below it")
        return found

    def private_names(self) -> list[str]:
        """Uses of a name with a leading underscore outside its module, and of such a module outside its folder."""
        found = []
        for module in self.modules.values():
            imports = list(self.imports(module))
            found += [f"{module.name}:{i.line} imports {i.name} of {i.module}" for i in imports if private(i.name)]
            for one in imports:
                folder, _, last = one.module.rpartition(".")
                if private(last) and module.folder != folder and not module.folder.startswith(folder + "."):
                    found.append(f"{module.name}:{one.line} imports {one.module}, which is private to {folder}")
            found += self._private_attributes(module, {one.alias or self.package for one in imports})
        return found

    def _private_attributes(self, module: Module, imported: set[str]) -> Iterator[str]:
        """`name._attribute` of an imported name, or of any object if only other modules define such an attribute."""
        others = {name for other in self.modules.values() if other is not module for name in other.defines}
        strangers = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        } - imported
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Attribute) or not private(node.attr):
                continue
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            name = base.id if isinstance(base, ast.Name) else ""
            theirs = node.attr in others and node.attr not in module.defines
            if name in imported or (theirs and name not in {"self", "cls", *strangers}):
                yield f"{module.name}:{node.lineno} uses {ast.unparse(node)}"
