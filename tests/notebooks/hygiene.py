"""The workbook's rules, each a function from a notebook to a list of complaints."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from kvgather.workbook.tables import is_house_table

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
PATTERN = "[0-9][0-9]*_*.ipynb"  # 08_prefix_path.ipynb, and 08b_… for the second half of a chapter
CHAPTERS = sorted(FOLDER.glob(PATTERN))

LINES = 30  # a cell is shorter than this
WIDGET = "[an interactive widget"  # how the text of a widget's view begins in a committed notebook
TEXT_TABLE = re.compile(r"^ *-{2,}(?: +-{2,})+ *$", flags=re.M)  # the line below the headers of a printed table
SPEAKING = {"print", "show", "display", "check", "table"}
IGNORED = "nbval-ignore-output"

Rule = Callable[["Notebook"], list[str]]
RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Notebook:
    path: Path
    content: Any

    @classmethod
    def read(cls, path: Path) -> Notebook:
        return cls(path, nbformat.read(path, as_version=4))

    @property
    def number(self) -> str:
        return self.path.name.partition("_")[0]

    @property
    def cells(self) -> list[Any]:
        return list(self.content.cells)

    @property
    def code(self) -> list[tuple[int, Any]]:
        """The code cells with their place in the notebook."""
        return [(i, cell) for i, cell in enumerate(self.cells) if cell.cell_type == "code"]

    def outputs(self) -> Iterator[tuple[int, Any]]:
        for i, cell in self.code:
            for output in cell.outputs:
                yield i, output

    @property
    def title(self) -> str:
        return str(self.cells[0].source).split("\n")[0].removeprefix("# ").strip()


def rule(function: Rule) -> Rule:
    RULES[function.__name__] = function
    return function


def complaints(notebook: Notebook, name: str) -> list[str]:
    return [f"{notebook.path.name}: {text}" for text in RULES[name](notebook)]


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


@rule
def executed_in_order(notebook: Notebook) -> list[str]:
    counts = [cell.execution_count for _, cell in notebook.code]
    expected = list(range(1, len(counts) + 1))
    return [] if counts == expected else [f"the code cells have the counts {counts}, not 1, 2, 3 …"]


@rule
def plain_python_kernel(notebook: Notebook) -> list[str]:
    spec = dict(notebook.content.metadata.get("kernelspec", {}))
    wanted = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return [] if spec == wanted else [f"the kernelspec is {spec}, not {wanted}"]


@rule
def nothing_personal_in_metadata(notebook: Notebook) -> list[str]:
    found = [f"notebook metadata has {key!r}" for key in notebook.content.metadata if key not in NOTEBOOK_METADATA]
    for i, cell in enumerate(notebook.cells):
        found += [f"cell {i} has metadata {key!r}" for key in cell.metadata if key not in CELL_METADATA]
    return found


NOTEBOOK_METADATA = ("kernelspec", "language_info")
CELL_METADATA = ("tags", "kvgather", "jupyter")


@rule
def speaking_cells_have_outputs(notebook: Notebook) -> list[str]:
    return [
        f"cell {i} prints or shows something, but its output is empty"
        for i, cell in notebook.code
        if not cell.outputs and _speaks(cell.source)
    ]


def _speaks(source: str) -> bool:
    """Whether a statement that is sure to run calls one of SPEAKING."""
    sure = [
        node for node in ast.parse(_without_magics(source)).body if isinstance(node, ast.Expr | ast.Assign | ast.With)
    ]
    calls = (node for statement in sure for node in ast.walk(statement) if isinstance(node, ast.Call))
    return any((getattr(c.func, "id", None) or getattr(c.func, "attr", None)) in SPEAKING for c in calls)


def _without_magics(source: str) -> str:
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.split("\n"))


@rule
def outputs_are_text_or_png(notebook: Notebook) -> list[str]:
    found = []
    for i, output in notebook.outputs():
        if output.output_type == "error":
            found.append(f"cell {i} raised {output.ename}")
        elif output.output_type == "stream" and output.name == "stderr":
            found.append(f"cell {i} wrote to stderr")
        data = output.get("data", {})
        for kind in sorted(set(data) - {"text/plain", "image/png", "text/html"}):
            found.append(f"cell {i} has an output of type {kind}")
        if "text/html" in data and not (is_house_table(data["text/html"]) and data.get("text/plain", "").strip()):
            found.append(f"cell {i} has HTML that is not a table of kvgather.workbook.tables, with its plain text")
    return found


@rule
def tables_are_html(notebook: Notebook) -> list[str]:
    """A printed table wraps in a window of 800 pixels, and is then unreadable."""
    found = []
    for i, output in notebook.outputs():
        data = output.get("data", {})
        text = output.get("text", "") or ("" if "text/html" in data else data.get("text/plain", ""))
        if TEXT_TABLE.search(text):
            found.append(f"cell {i} prints a table; use `table` of kvgather.workbook.tables")
    return found


@rule
def drawing_cells_are_folded(notebook: Notebook) -> list[str]:
    """JupyterLab folds the code of a cell that only draws or builds a widget, so that the story stands.

    A cell draws if its outputs are pictures and widgets, and nothing else. It does more than that if a later cell uses
    one of its names, or if its metadata says `"kvgather": {"open": "why the reader should see this code"}`.
    """
    found = []
    for place, (i, cell) in enumerate(notebook.code):
        folded = bool(cell.metadata.get("jupyter", {}).get("source_hidden"))
        draws = bool(cell.outputs) and all(map(_is_drawing, cell.outputs))
        reason = cell.metadata.get("kvgather", {}).get("open", "")
        later = "\n".join(_without_magics(other.source) for _, other in notebook.code[place + 1 :])
        used = sorted(_assigned(cell.source) & _free_names(later)) if draws else []
        if draws and not folded and not used and not reason:
            found.append(f"cell {i} only draws; fold it: the metadata lack jupyter.source_hidden")
        if folded and not draws:
            found.append(f"cell {i} is folded, but its outputs are not pictures or widgets alone")
        if folded and used:
            found.append(f"cell {i} is folded, but later cells use its {', '.join(used)}")
        if folded and (reason or {"exercise", "check"} & {*tags(cell)}):
            found.append(f"cell {i} is folded, but it is for the reader to see")
    return found


def _is_drawing(output: Any) -> bool:
    data = output.get("data", {})
    return "image/png" in data or data.get("text/plain", "").startswith(WIDGET)


def _assigned(source: str) -> set[str]:
    """The names that a cell's statements assign; not those of its loops, functions and imports."""
    body = ast.parse(_without_magics(source)).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    names = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    return defined | {name.id for name in names if isinstance(name.ctx, ast.Store)}


def _free_names(source: str) -> set[str]:
    """The names that a text of cells reads before it assigns them."""
    assigned: set[str] = set()
    free: set[str] = set()
    for statement in ast.parse(source).body:
        nodes = list(ast.walk(statement))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        inner = {node.arg for node in nodes if isinstance(node, ast.arg)}
        for node in nodes:
            if isinstance(node, ast.comprehension):
                inner |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
        stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        if hasattr(statement, "body"):  # in a loop, a `with` or a function, a name that is also assigned is its own
            inner |= stored
        free |= {name.id for name in names if isinstance(name.ctx, ast.Load)} - assigned - inner
        assigned |= stored
    return free


@rule
def outputs_are_the_same_everywhere(notebook: Notebook) -> list[str]:
    found = []
    for i, output in notebook.outputs():
        text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
        found += [f"cell {i} prints {match[0]!r}" for pattern in LOCAL if (match := re.search(pattern, text))]
    return found


# An object's address, and a path on somebody's machine.
LOCAL = (r"(?i)\bat 0x[0-9a-f]+", r"(?<![\w.])(?:/(?:home|root|tmp|work|Users|usr|opt|mnt)/\S+|[A-Z]:\\\S+)")


@rule
def code_runs_in_any_folder(notebook: Notebook) -> list[str]:
    """A path relative to the notebook is wrong for an engine or a reader that runs it from another one."""
    found = []
    for i, cell in notebook.code:
        found += [f"cell {i} has the path {path}" for path in re.findall(r"""["'](\.\.?/[^"']*)["']""", cell.source)]
    return found


@rule
def pictures_have_alt_texts(notebook: Notebook) -> list[str]:
    found = []
    for i, output in notebook.outputs():
        if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt", "").strip():
            found.append(f"cell {i} shows a picture without an alt text")
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            found += [f"cell {i} has an image without an alt text" for _ in re.findall(r"!\[\s*\]\(", cell.source)]
    return found


@rule
def cells_are_short(notebook: Notebook) -> list[str]:
    found = []
    for i, cell in enumerate(notebook.cells):
        parts = _parts(cell.source) if cell.cell_type == "markdown" else [cell.source]
        sizes = [len(part.split("\n")) for part in parts]
        found += [f"cell {i} has {size} lines, not under {LINES}" for size in sizes if size >= LINES]
    return found


def _parts(markdown: str) -> list[str]:
    """What a reader sees of a cell at once: the text outside folds, and each folded solution, a cell's code."""
    folded = re.findall(r"<details>.*?</details>", markdown, flags=re.S)
    code = [block for fold in folded for block in re.findall(r"```python\n(.*?)\n```", fold, flags=re.S)]
    texts = [re.sub(r"```python\n.*?\n```", "", fold, flags=re.S) for fold in folded]
    return [re.sub(r"<details>.*?</details>", "", markdown, flags=re.S), *texts, *code]


@rule
def links_resolve(notebook: Notebook) -> list[str]:
    found = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        for target in links(cell.source):
            if re.match(r"(https?|mailto):", target) or target.startswith("#"):
                continue
            if not (notebook.path.parent / target.split("#")[0]).exists():
                found.append(f"cell {i} links to {target}, which does not exist")
    return found


def links(markdown: str) -> list[str]:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


@rule
def few_outputs_are_ignored(notebook: Notebook) -> list[str]:
    ignored = [(i, cell) for i, cell in notebook.code if IGNORED in tags(cell)]
    found = []
    if 5 * len(ignored) > len(notebook.code):
        found.append(
            f"{len(ignored)} of {len(notebook.code)} code cells are tagged {IGNORED}; at most one in five may be"
        )
    for i, cell in ignored:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(_without_magics(cell.source)))):
            found.append(f"cell {i} is tagged {IGNORED}, but asserts nothing")
    return found


@rule
def no_tag_hides_a_cell_from_nbval(notebook: Notebook) -> list[str]:
    hiding = {"nbval-skip", "nbval-raises-exception", "raises-exception", "skip-execution"}
    return [f"cell {i} is tagged {tag}" for i, cell in notebook.code for tag in tags(cell) if tag in hiding]


@rule
def opens_with_the_banner(notebook: Notebook) -> list[str]:
    first = notebook.cells[0]
    if first.cell_type != "markdown":
        return ["the first cell is not the banner"]
    lines = first.source.split("\n")
    quote = [line.removeprefix(">").strip() for line in lines[1:] if line.startswith(">")]
    parts = "\n".join(quote).split("\n\n")
    found = []
    if not re.fullmatch(rf"# {notebook.number} · \S.*", lines[0]):
        found.append(f"the banner's title is {lines[0]!r}, not '# {notebook.number} · Title'")
    if not re.fullmatch(r"\*\*\d+ minutes\*\* · runs on .+, no GPU needed", parts[0]):
        found.append(f"the banner's first line is {parts[0]!r}, not '**N minutes** · runs on …, no GPU needed'")
    abilities = parts[1] if len(parts) > 1 else ""
    verbs = re.findall(r"\*\*(.+?)\*\*", abilities)
    if not abilities.startswith("You will be able to: ") or len(verbs) != 3:
        found.append(f"the banner has the bold verbs {verbs}, not three after 'You will be able to: '")
    wanted = _neighbours(notebook)
    if (parts[2] if len(parts) > 2 else "") != wanted:
        found.append(f"the banner's last line is {parts[2:]}, not {wanted!r}")
    return found


def _neighbours(notebook: Notebook) -> str:
    """The links to the previous and the next chapter of the same folder."""
    chapters = sorted(notebook.path.parent.glob(PATTERN))
    place = chapters.index(notebook.path)
    parts = []
    if place > 0:
        parts.append(f"← [{Notebook.read(chapters[place - 1]).title}]({chapters[place - 1].name})")
    if place + 1 < len(chapters):
        parts.append(f"[{Notebook.read(chapters[place + 1]).title}]({chapters[place + 1].name}) →")
    return " · ".join(parts)


@rule
def ends_with_what_you_know(notebook: Notebook) -> list[str]:
    last = notebook.cells[-1]
    match = re.search(
        r"^## What you know now\n(?P<known>.*?)^\*\*In the package:\*\*(?P<package>.*?)"
        r"^\*\*Sources:\*\*(?P<sources>.*?)(?=^\*\*Next:\*\*|\Z)",
        last.source,
        flags=re.S | re.M,
    )
    if last.cell_type != "markdown" or match is None:
        return ["the last cell lacks '## What you know now', '**In the package:**' and '**Sources:**', in this order"]
    found = []
    if (bullets := len(re.findall(r"^- ", match["known"], flags=re.M))) != 3:
        found.append(f"'What you know now' has {bullets} lines, not 3")
    if not [link for link in links(match["package"]) if link.startswith("../kvgather/")]:
        found.append("'In the package' links to no file of ../kvgather/")
    if not links(match["sources"]):
        found.append("'Sources' has no link")
    return found


@rule
def links_to_the_next_chapter(notebook: Notebook) -> list[str]:
    chapters = sorted(notebook.path.parent.glob(PATTERN))
    following = chapters[chapters.index(notebook.path) + 1 :]
    if not following:
        return []
    wanted = f"**Next:** [{Notebook.read(following[0]).title.replace(' · ', ' ')}]({following[0].name})"
    last = notebook.cells[-1].source.split("\n")[-1]
    return [] if last == wanted else [f"the last line is {last!r}, not {wanted!r}"]
