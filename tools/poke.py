"""Runs chapters with other values of their constants, and with other seeds: `make poke`.

`tests/notebooks/pokes/chNN.py` names the constants of a chapter that a reader may change, with two other values each.
For each value, and for each seed, all code cells of the chapter run in a process of its own. A run is bad if a cell
raises, prints to stderr (as warnings do), or asserts what is not so; if a skeleton's check does not say "not yet", or a
solution's check does not say "correct". A value in `Refused` must raise one of our errors that says what is accepted.

A cell runs in IPython, as in a notebook, without a kernel: a kernel takes longer to start than most chapters to run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Outside of a kernel a progress bar is text on stderr. tqdm reads this when it is imported, and torch imports tqdm.
os.environ["TQDM_DISABLE"] = "1"

from kvgather.lab import crash, crash_map  # noqa: E402
from kvgather.workbook import figures  # noqa: E402
from tests.notebooks.exercise_cells import exercises_of  # noqa: E402
from tests.notebooks.hygiene import CHAPTERS, Notebook  # noqa: E402
from tests.notebooks.pokes import Refused, Source  # noqa: E402

TABLES = ROOT / "tests" / "notebooks" / "pokes"
SEEDS, FEW_SEEDS = range(10), range(3)
SEEDED = {"manual_seed", "default_rng", "Random", "seed"}
"""Functions whose first argument is a seed if it is an integer."""
_PARENT = multiprocessing.parent_process()
CHILDREN = Path(tempfile.gettempdir()) / f"kvgather-poke-{_PARENT.pid if _PARENT else os.getpid()}"
"""Outcomes of child processes, for the time of this command."""
LIMIT = 180
"""Seconds of one run; a chapter takes up to 60."""
HEAVY = ("torch", "triton", "matplotlib.figure", "ipywidgets", "tabulate", "tqdm.auto", "kvgather.workbook.figures",
         "kvgather.workbook.checks", "IPython.core.interactiveshell", "ipykernel.compiler")  # fmt: skip
"""Imported once, before the runs are forked."""


class PokeError(ValueError):
    """A table or a chapter does not fit to the other."""


@dataclass(frozen=True)
class Table:
    """The constants of one chapter.

    Attributes:
        pokes: name, or names with commas between them, to other values.
        fixed: constants that the text does not invite to change, with the reason.
    """

    pokes: Mapping[str, Sequence[Any]]
    fixed: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One run of a chapter.

    Attributes:
        chapter: such as "08b".
        label: such as "PAGE = 8" or "seed 3".
        sources: of the code cells, changed.
        refused: what the error must say, if the value is one that the chapter refuses; else "".
    """

    chapter: str
    label: str
    sources: tuple[str, ...]
    refused: str = ""


@dataclass
class Result:
    """The outcome of a run; `complaint` is empty if it is good."""

    run: Run
    seconds: float
    complaint: str


def table_of(chapter: str) -> Table:
    """The table of a chapter.

    Raises:
        PokeError: there is none.
    """
    path = TABLES / f"ch{chapter}.py"
    spec = importlib.util.spec_from_file_location(f"pokes_ch{chapter}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise PokeError(f"{path.relative_to(ROOT)} is missing; accepted: a table of constants for each chapter")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Table(module.POKES, getattr(module, "FIXED", {}))


def runs_of(notebook: Notebook, table: Table, *, few: bool = False) -> list[Run]:
    """The runs of a chapter: for each constant its values, for each seed one, and none if the chapter has no seed.

    Args:
        notebook: the chapter.
        table: its constants.
        few: the first value of each constant, and three seeds.

    Raises:
        PokeError: a constant is not assigned in the chapter.
    """
    sources = tuple(cell.source for _, cell in notebook.code)
    runs = []
    for names, values in table.pokes.items():
        for value in values[:1] if few else values:
            plain, refused = (value.value, value.said) if isinstance(value, Refused) else (value, "")
            changes = _changes(names, plain)
            label = textwrap.shorten(", ".join(f"{name} = {text}" for name, text in changes.items()), 90)
            runs.append(Run(notebook.number, label, with_constants(sources, changes), refused))
    for seed in FEW_SEEDS if few else SEEDS:
        if (seeded := with_seed(sources, seed)) != sources:
            runs.append(Run(notebook.number, f"seed {seed}", seeded))
    return runs


def _changes(names: str, value: Any) -> dict[str, str]:
    keys = [name.strip() for name in names.split(",")]
    values = value if len(keys) > 1 else [value]
    return {key: str(part) if isinstance(part, Source) else repr(part) for key, part in zip(keys, values, strict=True)}


def with_constants(sources: Sequence[str], changes: Mapping[str, str]) -> tuple[str, ...]:
    """The cells with other values for constants.

    Args:
        sources: of all code cells.
        changes: by name, the source of the new value.

    Raises:
        PokeError: a name is not assigned at the top level of a cell.
    """
    changed = list(sources)
    for name, text in changes.items():
        for place, source in enumerate(changed):
            found = next((value for key, value in assignments(source) if key == name), None)
            if found is not None:
                changed[place] = _replaced(source, [(found, text)])
                break
        else:
            raise PokeError(f"no cell assigns {name}; accepted: a name that a cell assigns outside of functions")
    return tuple(changed)


def assignments(source: str) -> Iterator[tuple[str, ast.expr]]:
    """The names that a cell assigns at its top level, with the expression of each value."""
    for node in ast.parse(_plain(source)).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            assert isinstance(node, ast.Assign)
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                if len(target.elts) == len(node.value.elts):
                    for element, value in zip(target.elts, node.value.elts, strict=True):
                        if isinstance(element, ast.Name):
                            yield element.id, value


def constants(sources: Iterable[str]) -> list[str]:
    """The names in capitals whose value a cell spells out: numbers, texts, and tuples, lists and dicts of them."""
    found = []
    for source in sources:
        for name, value in assignments(source):
            if name.isupper() and _is_literal(value) and name not in found:
                found.append(name)
    return found


def is_seed(name: str) -> bool:
    """Whether a constant is a seed, which has runs of its own."""
    return name == "SEED" or name.endswith("_SEED")


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True


def with_seed(sources: Sequence[str], seed: int) -> tuple[str, ...]:
    """The cells with another seed.

    A constant `SEED`, or `…_SEED`, becomes `seed`. An integer that is passed to a function of `SEEDED` is moved by
    `seed + 1`, so that two generators with different seeds stay different.
    """
    changed = []
    for source in sources:
        edits = [(value, str(seed)) for name, value in assignments(source) if is_seed(name)]
        for node in ast.walk(ast.parse(_plain(source))):
            if isinstance(node, ast.Call) and node.args:
                name, first = getattr(node.func, "attr", getattr(node.func, "id", "")), node.args[0]
                if name in SEEDED and isinstance(first, ast.Constant) and type(first.value) is int:
                    edits.append((first, str(first.value + seed + 1)))
        changed.append(_replaced(source, edits))
    return tuple(changed)


def _plain(source: str) -> str:
    """Without magics, and with as many lines."""
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.split("\n"))


def _replaced(source: str, edits: Iterable[tuple[ast.expr, str]]) -> str:
    lines = source.encode().split(b"\n")  # the columns of ast count bytes
    for node, text in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        assert node.end_lineno is not None and node.end_col_offset is not None
        first, last = node.lineno - 1, node.end_lineno - 1
        lines[first : last + 1] = [lines[first][: node.col_offset] + text.encode() + lines[last][node.end_col_offset :]]
    return b"\n".join(lines).decode()


@dataclass
class Cells:
    """Runs cells one after the other, as a notebook does; `complaint` is empty as long as all is well."""

    folder: Path
    refused: str = ""
    complaint: str = ""
    ended: bool = False
    shell: Any = field(init=False)

    def __post_init__(self) -> None:
        from ipykernel.compiler import XCachingCompiler
        from IPython.core.displaypub import CapturingDisplayPublisher
        from IPython.core.interactiveshell import InteractiveShell
        from tqdm.auto import tqdm
        from traitlets.config import Config

        # Outside of a kernel a progress bar is text on stderr.
        setattr(figures, "tqdm", functools.partial(tqdm, disable=True))  # noqa: B010
        remember_children(CHILDREN)
        os.chdir(self.folder)
        self.shell = InteractiveShell.instance(
            config=Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}}),
            compiler_class=XCachingCompiler, display_pub_class=CapturingDisplayPublisher,
        )  # fmt: skip

    def run(self, source: str, what: str) -> str:
        """Run one cell and return what it printed."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            result = self.shell.run_cell(source, store_history=False)
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            self._raised(error, what)
        elif err.getvalue().strip():
            self._complain(f"{what} printed to stderr: {err.getvalue().strip()[-600:]}")
        return out.getvalue()

    def _raised(self, error: BaseException, what: str) -> None:
        told = f"{what} raised {type(error).__name__}: {str(error).strip()[:600]}"
        if not self.refused:
            self._complain(f"{told}\n{_where(error)}")
        elif not announced(error):
            self._complain(f"{told}, which is not one of our errors that say what is accepted\n{_where(error)}")
        elif self.refused not in str(error):
            self._complain(f"{told}, which does not say {self.refused!r}")
        self.ended = True

    def _complain(self, text: str) -> None:
        self.complaint, self.ended = text, True

    def exercise(self, skeleton: str, check: str, solution: str, what: str) -> None:
        """Run a check on the skeleton, which runs before and after, and on the solution."""
        for source, verdict in ((skeleton, "not yet: "), (solution, "correct: ")):
            self.run(source, f"{what}, {'its solution' if source == solution else 'its skeleton'}")
            if not self.ended and not (said := self.run(check, what)).startswith(verdict):
                self.complaint = self.complaint or f"{what}: the check says {said.strip()!r}, not {verdict!r}"
                self.ended = True
            if self.ended:
                return
        self.run(skeleton, what)


def remember_children(folder: Path) -> None:
    """Let each crash case and each map run once for all runs of a command; `folder` has what came out.

    Their child processes import torch and die, which takes as long as a short chapter, and what comes out depends on
    the arguments alone, not on a chapter's constants.
    """
    crash.run_child = _remembered(crash.run_child, folder)
    run_map = _remembered(lambda *arguments, **options: list(_run_map(*arguments, **options)), folder)
    crash_map.run_map = lambda *arguments, **options: iter(run_map(*arguments, **options))


_run_map = crash_map.run_map


def _remembered(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def remembered(*arguments: Any, **options: Any) -> Any:
        key = repr((function.__name__, arguments, sorted(options.items())))
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pickle"
        if not file.exists():
            result = function(*arguments, **options)
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            part.write_bytes(pickle.dumps(result))
            part.replace(file)
        return pickle.loads(file.read_bytes())

    return remembered


def announced(error: BaseException) -> bool:
    """Whether an error is one of ours that says what is accepted: raised in the package, or by a cell's own `raise`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).is_relative_to(ROOT / "kvgather") or (frame.line or "").startswith("raise ")
    own = type(error).__module__.startswith("kvgather.")  # such as OutOfBlocksError, whose message has its own form
    return ours and (own or (isinstance(error, ValueError | TypeError) and "accepted" in str(error)))


def _where(error: BaseException) -> str:
    """The innermost lines of the traceback, from the cell on."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "IPython" not in frame.filename]
    return "\n".join(f"    {Path(frame.filename).name}:{frame.lineno}: {frame.line}" for frame in frames[-4:])


def perform(run: Run, notebook: Notebook) -> str:
    """Run the cells of a chapter in this process, and return the complaint, or ""."""
    cells = Cells(notebook.path.parent, run.refused)
    exercises = {exercise.place: exercise for exercise in exercises_of(notebook)}
    checks = {exercise.place + 2: exercise for exercise in exercises.values()}
    sources = dict(zip((place for place, _ in notebook.code), run.sources, strict=True))
    for place, source in sources.items():
        if place in checks:
            exercise = checks[place]
            what = f"exercise {exercise.name}"
            cells.exercise(sources[exercise.place], source, exercise.solution, what)
        elif place not in exercises:
            cells.run(source, f"cell {place}")
        if cells.ended:
            break
    if run.refused and not cells.ended:
        return f"every cell ran, though the chapter should refuse with {run.refused!r}"
    return cells.complaint


def _child(run: Run, notebook: Notebook, pipe: Connection) -> None:
    """Perform a run with the output of its own child processes, and of C code, in a file."""
    warnings.resetwarnings()
    warnings.showwarning = _show_warning
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)  # as a kernel shows warnings
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
    with tempfile.TemporaryFile() as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            complaint = perform(run, notebook)
        except BaseException:
            complaint = f"poke itself failed:\n{traceback.format_exc()}"
        if not complaint:
            file.seek(0)
            complaint = _warnings(file.read().decode(errors="replace"))
    pipe.send(complaint)
    pipe.close()
    os._exit(0)  # threads of a chapter's widgets or child processes do not delay the next run


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print a warning as Python does; a test that started this process may have replaced what does."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _warnings(text: str) -> str:
    lines = [line for line in text.splitlines() if "Warning" in line]
    return f"printed past Python: {lines[0]}" if lines else ""


def perform_all(runs: Sequence[tuple[Run, Notebook]], jobs: int) -> Iterator[Result]:
    """Perform runs in processes of their own, `jobs` at a time; results come in the order in which runs end."""
    context: Any = multiprocessing.get_context(_start_method())
    waiting = list(runs)
    active: dict[Connection, tuple[Run, Any, float]] = {}
    while waiting or active:
        while waiting and len(active) < jobs:
            run, notebook = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(run, notebook, theirs))
            with warnings.catch_warnings():
                # Python 3.12 and newer: other threads, such as those of a test's worker, only wait for messages.
                warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
                process.start()
            theirs.close()
            active[ours] = run, process, time.monotonic()
        first = min(start for _, _, start in active.values())
        ready = wait(list(active), timeout=max(0.0, first + LIMIT - time.monotonic()))
        for pipe, (run, process, start) in list(active.items()):
            if pipe in ready or time.monotonic() - start > LIMIT:
                del active[pipe]
                complaint = _received(pipe, process) if pipe in ready else f"ran longer than {LIMIT} s"
                process.kill()
                process.join()
                yield Result(run, time.monotonic() - start, complaint)


def _received(pipe: Connection, process: Any) -> str:
    try:
        return str(pipe.recv())
    except EOFError:
        process.join()
        return f"the process ended with exit status {process.exitcode}"


def _start_method() -> str:
    """Forked runs share the imports. A process that has looked for a GPU must not be forked."""
    gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return "fork" if sys.platform == "linux" and not gpu else "spawn"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chapters of the command line; returns 1 if a run is bad."""
    parser = argparse.ArgumentParser(prog="tools/poke.py", description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", help="such as 03 or 08b; none means all")
    parser.add_argument("--few", action="store_true", help="one value of each constant, and three seeds")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this text, such as PAGE or 'seed 3'")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="processes at a time")
    parser.add_argument("--json", action="store_true", help="print the bad runs as JSON at the end")
    options = parser.parse_args(arguments)
    notebooks = [Notebook.read(path) for path in CHAPTERS]
    chosen = [notebook for notebook in notebooks if not options.chapters or notebook.number in options.chapters]
    if unknown := set(options.chapters) - {notebook.number for notebook in notebooks}:
        parser.error(f"chapters are {', '.join(sorted(unknown))}; accepted: {', '.join(n.number for n in notebooks)}")
    if _start_method() == "fork":
        for name in HEAVY:
            if importlib.util.find_spec(name.partition(".")[0]):
                importlib.import_module(name)
    try:
        pairs = [(run, n) for n in chosen for run in runs_of(n, table_of(n.number), few=options.few)]
    except PokeError as error:
        print(error, file=sys.stderr)
        return 1
    bad, start = [], time.monotonic()
    pairs = [(run, notebook) for run, notebook in pairs if options.only in run.label]
    try:
        for result in perform_all(pairs, options.jobs):
            mark = "bad" if result.complaint else "ok"
            print(f"{mark:4}{result.run.chapter:4}{result.seconds:6.1f} s  {result.run.label}", flush=True)
            if result.complaint:
                bad.append(result)
                print("    " + result.complaint.replace("\n", "\n    "), flush=True)
    finally:
        shutil.rmtree(CHILDREN, ignore_errors=True)
    print(f"{len(pairs) - len(bad)} of {len(pairs)} runs are good, in {time.monotonic() - start:.0f} s")
    if options.json:
        print(json.dumps([[result.run.chapter, result.run.label, result.complaint] for result in bad]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
